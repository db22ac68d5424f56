"""Converts reports to the contract's messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex.v1.adapter_store_pb2 import AdapterReport

from loraplex_adapter_store import wire

if TYPE_CHECKING:
    from loraplex_adapter_store.import_notes import ImportNotes
    from loraplex_adapter_store.measures import ModuleMeasure, PartMeasure
    from loraplex_adapter_store.reports import ImageSize, Report


def report(source: Report) -> AdapterReport:
    """Convert a report."""
    return AdapterReport(
        name=source.name,
        revision=wire.revision(source.revision),
        notes=_notes(source.notes) if source.notes is not None else None,
        modules=[_module(each, source.norms.get((each.layer, each.projection))) for each in source.measured.modules],
        invocation_token_ids=source.measured.invocation_token_ids,
        images=[_image(each) for each in source.images],
    )


def _notes(source: ImportNotes) -> AdapterReport.ImportNotes:
    return AdapterReport.ImportNotes(
        method=source.method,
        rules=source.rules,
        folded=source.folded,
        warnings=source.warnings,
        num_omitted=source.num_omitted,
        signer=source.signer,
    )


def _module(source: ModuleMeasure, base_norm: float | None) -> AdapterReport.Module:
    return AdapterReport.Module(
        layer=source.layer,
        projection=source.projection,
        parts=[_part(each, base_norm) for each in source.parts],
        base_norm=base_norm,
    )


def _part(source: PartMeasure, base_norm: float | None) -> AdapterReport.Part:
    relative = source.norm / base_norm if source.has_relative_norm and source.norm is not None and base_norm else None
    return AdapterReport.Part(
        kind=source.kind,
        size=source.size,
        scale=source.scale,
        norm=source.norm,
        relative_norm=relative,
        largest=source.largest,
        deviation=source.deviation,
        magnitude=source.is_magnitude,
    )


def _image(source: ImageSize) -> AdapterReport.Image:
    geometry = source.geometry
    return AdapterReport.Image(
        dtype=geometry.dtype,
        page_bytes=geometry.page_bytes,
        tp_degree=geometry.tp_degree,
        num_pages=source.num_pages,
        num_bytes=source.num_pages * geometry.page_bytes,
        problem=source.problem,
    )
