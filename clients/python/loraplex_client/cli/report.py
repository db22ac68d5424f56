"""Prints what an adapter is made of."""

import json

import typer
from loraplex_common.low_rank import LOW_RANK
from loraplex_common.sizes import format_size
from loraplex_common.sparse_delta import SPARSE_DELTA
from rich.table import Table

from loraplex_client.cli.context import stdout
from loraplex_client.report import AdapterReport, ReportNotes, ReportPart


def print_report(report: AdapterReport, *, as_json: bool) -> None:
    """Print a report: tables, or one JSON object."""
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    _line(f"{report.name}@{report.revision}, from {report.source}")
    _print_notes(report.notes)
    _line(f"brings: {', '.join(report.text_parts) or 'weights alone'}")
    if report.invocation_token_ids:
        _line(f"applies from: the last {' '.join(map(str, report.invocation_token_ids))} in a prompt on (token ids)")
    _line(f"store: {format_size(report.canonical_bytes)} (canonical form)")
    for image in report.images:
        ranks = f", each of {image.tp_degree} ranks" if image.tp_degree > 1 else ""
        where = f"engines ({image.dtype}, pages of {format_size(image.page_bytes)}{ranks})"
        _line(f"{where}: {image.problem or f'{format_size(image.num_bytes)}, {image.num_pages} pages'}")
    if not report.images:
        _line("engines: none of its base is attached to this store")
    stdout.print(_modules(report))


def _line(text: str) -> None:
    stdout.print(text, soft_wrap=True)


def _print_notes(notes: ReportNotes | None) -> None:
    if notes is None:
        _line("import: not recorded (an earlier version stored the revision; importing it again records it)")
        return
    _line(f"method: {notes.method}")
    if notes.signer:
        _line(f"signed by: {notes.signer}")
    for what, said in (("read", notes.rules), ("folded", notes.folded), ("warning", notes.warnings)):
        for note in said:
            _line(f"{what}: {note}")
    if notes.num_omitted:
        _line(f"{notes.num_omitted} more notes were too long to be kept")


def _modules(report: AdapterReport) -> Table:
    table = Table("LAYER", "PROJECTION", "PART", "SIZE", "SCALE", "NORM", "OF BASE", "LARGEST", "FROM 1", box=None)
    for module in report.modules:
        for part in module.parts:
            table.add_row(
                str(module.layer),
                module.projection,
                f"{part.kind} (magnitudes)" if part.is_magnitude else part.kind,
                str(part.size),
                _number(part.scale),
                _number(part.norm),
                _relative(part, module.base_norm),
                _number(part.largest),
                _number(part.deviation),
            )
    return table


def _relative(part: ReportPart, base_norm: float | None) -> str:
    if part.kind not in (LOW_RANK, SPARSE_DELTA):
        return "-"
    return "unknown" if base_norm is None else _number(part.relative_norm)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
