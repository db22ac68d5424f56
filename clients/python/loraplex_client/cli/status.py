"""``loraplex status``: engines, their load, what they hold."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from loraplex_common.errors import AdapterForbiddenError, LoraplexError, RoleForbiddenError
from loraplex_common.sizes import format_size
from rich.table import Table

from loraplex_client._engines import EngineStatus, HeldAdapter, engine_status, fleet_status
from loraplex_client._servers import Servers
from loraplex_client.cli.context import StoreTarget, Target, connect, servers_of, stderr, stdout
from loraplex_client.cli.option_groups import grouped
from loraplex_client.cli.registered import refuse_password_in_view, registered_engines
from loraplex_client.resources import Model
from loraplex_client.valkey_access import ValkeyAccess


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """Which engines are asked themselves; none by default."""

    engine_target: Annotated[
        list[str] | None,
        typer.Option(
            envvar="LORAPLEX_ENGINE_TARGET",
            help="Ask the engine at this gRPC address itself; may be given again (default: ask the gateway for all).",
            metavar="HOST:PORT",
        ),
    ] = None
    redis_url: Annotated[
        str | None,
        typer.Option(envvar="LORAPLEX_REDIS_URL", help="Ask all engines in this Valkey's registry themselves."),
    ] = None
    redis_password_file: Annotated[
        Path | None,
        typer.Option(
            envvar="LORAPLEX_REDIS_PASSWORD_FILE", help="Its password for the user in the URL.", metavar="FILE"
        ),
    ] = None
    redis_tls_ca: Annotated[
        Path | None,
        typer.Option(envvar="LORAPLEX_REDIS_TLS_CA", help="Trust its certificate by this, PEM.", metavar="FILE"),
    ] = None


@grouped
def status(
    context: typer.Context, target: Target = None, store_target: StoreTarget = None, *, asked: EngineOptions
) -> None:
    """Show models, engines with their load, and where each adapter is. Fails if a part does not answer."""
    refuse_password_in_view(context, asked.redis_url)
    servers = servers_of(context, target, store_target)
    problems: list[str] = []
    if asked.engine_target or asked.redis_url is not None:
        engines = _ask_engines(_targets(asked, servers, problems), servers, problems)
    else:
        engines = _ask_gateway(servers, problems)
    stdout.print(_engine_table(engines))
    for engine in engines:
        if engine.passed_over:
            stderr.print(
                f"note: engine {engine.engine_id[:12]} gets no new requests: {engine.passed_over}; start all engines of a base "
                "model alike, or the gateways with --allow-mixed-numerics",
                soft_wrap=True,
            )
    with connect(context, target, store_target) as client:
        try:
            models = client.list_models()
        except LoraplexError as error:
            problems.append(f"gateway: {error.message}")
        else:
            stdout.print()
            stdout.print(_model_table(models, engines))
    for problem in dict.fromkeys(problems):
        stderr.print(f"error: {problem}", soft_wrap=True)
    if problems:
        raise typer.Exit(1)


def _targets(asked: EngineOptions, servers: Servers, problems: list[str]) -> list[str]:
    """Return the addresses of the engines that are asked themselves; adds to ``problems`` why there is none."""
    targets = list(asked.engine_target or ())
    if asked.redis_url is not None:
        access = ValkeyAccess(url=asked.redis_url, password_file=asked.redis_password_file, tls_ca=asked.redis_tls_ca)
        targets += _registered(access, servers, problems)
        if not targets and not problems:
            problems.append("no engine is registered")
    return targets


def _ask_gateway(servers: Servers, problems: list[str]) -> list[EngineStatus]:
    """Return the engines that a gateway sends requests to; adds to ``problems`` what does not answer.

    That a tenant may not see them is no problem of the deployment's: it is said, and that is all.
    """
    for gateway in servers.gateways:
        try:
            engines, silent = fleet_status(gateway)
            break
        except (AdapterForbiddenError, RoleForbiddenError) as error:
            stderr.print(f"note: engines are not shown: {error.message}", soft_wrap=True)
            return []
        except LoraplexError as error:
            problems.append(f"gateway: {error.message}")
    else:
        return []
    problems += [f"engine {engine}: {error.message}, says the gateway" for engine, error in silent.items()]
    if not engines and not silent:
        problems.append("the gateway knows no engine")
    return engines


def _registered(access: ValkeyAccess, servers: Servers, problems: list[str]) -> list[str]:
    """Return the addresses of the engines in a registry; adds to ``problems`` why they are not known."""
    try:
        return asyncio.run(registered_engines(access, servers.engine("")))
    except ConnectionError as error:
        problems.append(f"valkey: {error}")
        return []


def _ask_engines(targets: list[str], servers: Servers, problems: list[str]) -> list[EngineStatus]:
    """Return what engines say of themselves; adds to ``problems`` what is wrong with those that do not."""
    engines: list[EngineStatus] = []
    for target in targets:
        try:
            engines.append(engine_status(servers.engine(target)))
        except LoraplexError as error:
            problems.append(f"engine: {error.message}")
    return engines


def _engine_table(engines: list[EngineStatus]) -> Table:
    table = Table(
        "ENGINE", "TARGET", "MODEL", "COMPUTE", "RUN", "WAIT", "TOK/S", "POOL", "KV/LORA/PINNED/FREE", box=None
    )
    for engine in engines:
        table.add_row(
            engine.engine_id[:12] + (" (draining)" if engine.is_draining else ""),
            engine.target,
            engine.base_model,
            f"{engine.backend} {engine.numerics or engine.dtype}",
            str(engine.running),
            str(engine.waiting),
            f"{engine.tokens_per_s:.1f}",
            format_size(engine.pages_total * engine.page_bytes),
            f"{engine.pages_kv}/{engine.pages_adapter}/{engine.pages_pinned}/{engine.pages_free}",
        )
    return table


def _model_table(models: list[Model], engines: list[EngineStatus]) -> Table:
    """Return one row per revision that a label points at, with the labels of that revision."""
    table = Table("MODEL", "BASE", "REVISION", "LABELS", "RESIDENCY", box=None)
    for model in models:
        if not model.is_adapter:
            table.add_row(model.name, "(base)", "-", "", "-")
            continue
        for digest in dict.fromkeys((model.revision, *sorted(model.aliases.values()))):
            held = [adapter for engine in engines for adapter in engine.adapters if adapter.digest == digest]
            labels = sorted(label for label, pointed_at in model.aliases.items() if pointed_at == digest)
            table.add_row(
                model.name, model.base_model, digest[:12], ", ".join(labels), _residency(held) if engines else "-"
            )
    return table


def _residency(held: list[HeldAdapter]) -> str:
    on_device = [adapter for adapter in held if adapter.is_on_device]
    if on_device:
        leases = sum(adapter.num_leases for adapter in on_device)
        pages = on_device[0].num_pages
        return f"device on {len(on_device)}, {pages} pages, {leases} leases"
    return f"arena on {len(held)}" if held else "store"
