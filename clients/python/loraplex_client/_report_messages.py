"""Turns the wire message of a report into `report`; shared by both clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraplex_client.report import AdapterReport, ReportImage, ReportModule, ReportNotes, ReportPart

if TYPE_CHECKING:
    from loraplex.v1 import adapter_store_pb2


def report(message: adapter_store_pb2.AdapterReport) -> AdapterReport:
    """Return a report."""
    revision = message.revision
    return AdapterReport(
        name=message.name,
        revision=revision.revision,
        base_fingerprint=revision.base_fingerprint,
        source=revision.source,
        canonical_bytes=revision.canonical_bytes,
        text_parts=tuple(revision.text_parts.kinds),
        invocation_token_ids=tuple(message.invocation_token_ids),
        notes=_notes(message.notes) if message.HasField("notes") else None,
        images=tuple(_image(each) for each in message.images),
        modules=tuple(_module(each) for each in message.modules),
    )


def _notes(message: adapter_store_pb2.AdapterReport.ImportNotes) -> ReportNotes:
    return ReportNotes(
        method=message.method,
        rules=tuple(message.rules),
        folded=tuple(message.folded),
        warnings=tuple(message.warnings),
        num_omitted=message.num_omitted,
        signer=message.signer,
    )


def _image(message: adapter_store_pb2.AdapterReport.Image) -> ReportImage:
    return ReportImage(
        dtype=message.dtype,
        page_bytes=message.page_bytes,
        tp_degree=message.tp_degree,
        num_pages=message.num_pages,
        num_bytes=message.num_bytes,
        problem=message.problem,
    )


def _module(message: adapter_store_pb2.AdapterReport.Module) -> ReportModule:
    return ReportModule(
        layer=message.layer,
        projection=message.projection,
        base_norm=_optional(message, "base_norm"),
        parts=tuple(_part(each) for each in message.parts),
    )


def _part(message: adapter_store_pb2.AdapterReport.Part) -> ReportPart:
    return ReportPart(
        kind=message.kind,
        size=message.size,
        scale=_optional(message, "scale"),
        norm=_optional(message, "norm"),
        relative_norm=_optional(message, "relative_norm"),
        largest=message.largest,
        deviation=_optional(message, "deviation"),
        is_magnitude=message.magnitude,
    )


def _optional(message: Any, field: str) -> float | None:
    return getattr(message, field) if message.HasField(field) else None
