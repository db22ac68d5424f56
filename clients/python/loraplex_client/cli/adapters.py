"""``loraplex adapters``: what the store keeps."""

import re
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from loraplex_common.directories import adapter_directory_problem
from loraplex_common.sizes import format_size
from rich.table import Table
from rich.text import Text

from loraplex_client.adapter_manifest import HUB_SOURCE
from loraplex_client.cli.apply import apply
from loraplex_client.cli.context import StoreTarget, connect, progress_bars, stderr, stdout, warn_of_late_gateways
from loraplex_client.cli.global_options import remote
from loraplex_client.cli.live import history, labels, push, rollback
from loraplex_client.cli.make_random import make_random
from loraplex_client.cli.report import print_report
from loraplex_client.cli.wording import as_flags
from loraplex_client.resources import Adapter, ImportProgress, ImportResult, Revision

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Import, list and name adapters.")

URI_SCHEMES: Final = ("s3://", "oci://")
Name = Annotated[str, typer.Argument(help="The adapter's name.", metavar="NAME", show_default=False)]
AnyName = Annotated[
    str,
    typer.Argument(help="NAME, NAME:LABEL or NAME@REVISION (of its digits, 8 do).", metavar="NAME", show_default=False),
]
Source = Annotated[
    str,
    typer.Argument(
        help="A PEFT directory, hf:ORG/REPO[/SUBFOLDER]@COMMIT (40 hex digits), s3://BUCKET/FOLDER or "
        "oci://REGISTRY/REPO@sha256:...",
        metavar="SOURCE",
        show_default=False,
    ),
]
EngineId = Annotated[str, typer.Option("--engine", help="Only on this engine.", metavar="ID")]


@app.callback()
@remote
def _group(context: typer.Context) -> None:
    pass


@app.command("import")
@remote
def import_(
    context: typer.Context,
    name: Name,
    source: Source,
    label: Annotated[str, typer.Option(help="Label to move to the new revision besides latest.")] = "",
    base_model: Annotated[str, typer.Option(help="Base to check against instead of the one it names.")] = "",
    also_base: Annotated[list[str] | None, typer.Option(help="Further base that it may serve on; repeatable.")] = None,
    stage: Annotated[
        bool, typer.Option("--stage", help="Leave latest where it is: use NAME@REVISION, or --label.")
    ] = False,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Let the store read the directory itself, below its import roots.")
    ] = False,
    credential: Annotated[
        str, typer.Option(help="Name of a credential that the store knows, for a private hf:, s3: or oci: source.")
    ] = "",
    store_target: StoreTarget = None,
) -> None:
    """Import an adapter from a directory, the Hugging Face hub, object storage or a registry."""
    with connect(context, store_target=store_target) as client, progress_bars() as update:

        def progress(state: ImportProgress) -> None:
            update(f"{name}: {state.stage.value}", state.bytes_done, state.bytes_total)

        options: dict[str, Any] = {"label": label, "base_model": base_model, "also_base_models": also_base or ()}
        options |= {"stage": stage, "progress": progress}
        if source.startswith("hf:"):
            repo, kept = _hub_source(source), {"credential_ref": credential, **options}
            commit, folder = repo["revision"].lower(), repo["subfolder"] or ""
            result = client.adapters.import_hub(name, repo["repo"], revision=commit, subfolder=folder, **kept)
        elif source.startswith(URI_SCHEMES):
            result = client.adapters.import_uri(name, source, credential_ref=credential, **options)
        else:
            directory = _directory(source)
            if credential:
                raise typer.BadParameter("a directory needs none", param_hint="--credential")
            put = client.adapters.import_directory if in_place else client.adapters.upload
            result = put(name, directory, **options)
    _print_import(name, result)


for _command in (apply, push, labels, history, rollback):
    app.command()(remote(_command))
app.command("make-random")(remote(make_random))


@app.command("list")
@remote
def list_(
    context: typer.Context,
    prefix: Annotated[str, typer.Option(help="Only names beginning so.")] = "",
    deleted: Annotated[bool, typer.Option("--deleted", help="Deleted ones too.")] = False,
    store_target: StoreTarget = None,
) -> None:
    """List adapters by name."""
    table = Table("NAME", "STATE", "REVISION", "RANK", "SIZE", "BRINGS", "LABELS", "ALSO ON", box=None)
    with connect(context, store_target=store_target) as client:
        for adapter in client.adapters.list(prefix=prefix, show_deleted=deleted):
            latest = adapter.latest
            table.add_row(
                adapter.name,
                adapter.state.value,
                latest.digest[:12] if latest else "-",
                str(latest.max_rank) if latest else "-",
                format_size(latest.canonical_bytes) if latest else "-",
                ", ".join(latest.text_parts) if latest and latest.text_parts else "-",
                ", ".join(_labels(adapter)),
                ", ".join(sorted(adapter.counterparts.get(latest.digest, ()))) if latest else "",
            )
    stdout.print(table)


@app.command()
@remote
def show(
    context: typer.Context,
    name: AnyName,
    report: Annotated[
        bool, typer.Option("--report", help="What it is made of instead: norms of each module, bytes, import notes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
    store_target: StoreTarget = None,
) -> None:
    """Show one adapter and its revisions, or the report on one revision."""
    if as_json and not report:
        raise typer.BadParameter("it is a form of the report: give --report too", param_hint="--json")
    if report:
        with connect(context, store_target=store_target) as client:
            print_report(client.adapters.report(name), as_json=as_json)
        return
    with connect(context, store_target=store_target) as client:
        adapter = client.adapters.get(name)
        revisions = list(client.adapters.revisions(adapter.name))
    _print_adapter(adapter)
    if adapter.resolved is not None:
        _print_revision(adapter.resolved)
    standing_for = {
        other: f"for {base} in place of {digest[:12]}"
        for digest, others in adapter.counterparts.items()
        for base, other in others.items()
    }
    for revision in revisions:
        labels = sorted(label for label, digest in adapter.aliases.items() if digest == revision.digest)
        labels += [standing_for[revision.digest]] if revision.digest in standing_for else []
        stdout.print(f"  {revision.digest}  {', '.join(labels)}", soft_wrap=True)


@app.command()
@remote
def alias(
    context: typer.Context,
    name: Name,
    label: Annotated[str, typer.Argument(help="The label, e.g. prod.", metavar="LABEL", show_default=False)],
    revision: Annotated[
        str,
        typer.Argument(
            help="Digest or its first digits, at least 8; or a label of the same adapter.", metavar="REVISION"
        ),
    ] = "latest",
    remove: Annotated[bool, typer.Option("--remove", help="Remove the label.")] = False,
    expect: Annotated[
        str | None, typer.Option(help="Fail unless the label points here now (empty: nowhere).", metavar="REVISION")
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="Share of the label's requests, instead of REVISION; repeatable.", metavar="REVISION=WEIGHT"),
    ] = None,
    store_target: StoreTarget = None,
) -> None:
    """Point NAME:LABEL at a revision, or split it between several, atomically; running requests keep theirs."""
    shares = dict(_share(text) for text in split or ())
    with connect(context, store_target=store_target) as client:
        known = client.adapters.get(name).aliases
        wanted = {known.get(each, each): weight for each, weight in shares.items()}
        target = "" if remove else wanted or known.get(revision, revision)
        adapter = client.adapters.alias(name, label, target, expected_revision=expect)
    now = adapter.shares.get(label) or {adapter.aliases.get(label, ""): 1}
    said = ", ".join(digest if len(now) == 1 else f"{digest} {weight}" for digest, weight in sorted(now.items()))
    stdout.print(f"{name}:{label} {'removed' if remove else '-> ' + said}", soft_wrap=True)


@app.command()
@remote
def delete(
    context: typer.Context,
    name: Name,
    force: Annotated[
        bool, typer.Option("--force", help="Even while requests use it; they finish all the same.")
    ] = False,
    store_target: StoreTarget = None,
) -> None:
    """Delete an adapter's name; no new requests."""
    with connect(context, store_target=store_target) as client:
        client.adapters.delete(name, force=force)
    stdout.print(f"deleted {name}")


@app.command()
@remote
def prefetch(context: typer.Context, name: AnyName, engine: EngineId = "", store_target: StoreTarget = None) -> None:
    """Hint that an adapter will be wanted."""
    with connect(context, store_target=store_target) as client:
        client.adapters.prefetch(name, engine_id=engine)


@app.command()
@remote
def evict(context: typer.Context, name: AnyName, engine: EngineId = "", store_target: StoreTarget = None) -> None:
    """Hint that an adapter will not be wanted."""
    with connect(context, store_target=store_target) as client:
        client.adapters.evict(name, engine_id=engine)


def _share(text: str) -> tuple[str, int]:
    revision, _, weight = text.rpartition("=")
    if not revision or not weight.isdecimal():
        raise typer.BadParameter(f"{text!r}: write REVISION=WEIGHT, e.g. latest=5", param_hint="--split")
    return revision, int(weight)


def _labels(adapter: Adapter) -> list[str]:
    """Return an adapter's labels; those of another revision than the row's with it."""
    latest = adapter.latest.digest if adapter.latest else ""
    return [
        label if digest == latest else f"{label}@{digest[:12]}" for label, digest in sorted(adapter.aliases.items())
    ]


def _hub_source(source: str) -> re.Match[str]:
    match = HUB_SOURCE.fullmatch(source)
    if match is None:
        missing = "" if "@" in source else ": it lacks the commit, and a branch would move"
        raise typer.BadParameter(
            f"{source!r} is not hf:ORG/REPO[/SUBFOLDER]@COMMIT (40 hex digits){missing}", param_hint="SOURCE"
        )
    return match


def _directory(source: str) -> Path:
    """Return a directory; one that the store is to read may be on its machine, where only it can look."""
    if not Path(source).is_absolute() and (problem := adapter_directory_problem(source)):
        raise typer.BadParameter(problem, param_hint="SOURCE")
    return Path(source)


def _print_import(name: str, result: ImportResult) -> None:
    # Not "unchanged": the store may know the weights from another name, or the label may have moved back to them.
    known = " (weights known)" if result.already_existed else ""
    revision = result.revision
    stdout.print(
        f"imported {name}@{revision.digest[:12]}{known}: rank {revision.max_rank}, {', '.join(revision.target_modules)}, "
        f"{format_size(revision.canonical_bytes)}{_brings(revision)}",
        soft_wrap=True,
    )
    for warning in result.warnings:
        stderr.print(f"warning: {as_flags(warning)}", soft_wrap=True)
    warn_of_late_gateways(result.late_gateways)


def _brings(revision: Revision) -> str:
    """Return what a revision brings besides weights, for the end of a line."""
    kinds = [kind.replace("_", " ") for kind in revision.text_parts]
    return f"; brings {', '.join(kinds)}" if kinds else ""


def _print_adapter(adapter: Adapter) -> None:
    stdout.print(Text.assemble((adapter.name, "bold"), f"  {adapter.state.value}  {adapter.description}"))
    if adapter.allowed_tenants:
        stdout.print(f"tenants: {', '.join(adapter.allowed_tenants)}")


def _print_revision(revision: Revision) -> None:
    stdout.print(
        f"revision {revision.digest}\n"
        f"rank {revision.max_rank}, {revision.num_layers} layers, {', '.join(revision.target_modules)}\n"
        f"{revision.num_parameters:,} parameters, {format_size(revision.canonical_bytes)}, from {revision.source}"
        f"{_brings(revision)}",
        soft_wrap=True,
    )
