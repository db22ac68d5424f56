"""``loraplex status``: engines, their load, what they hold."""

import asyncio
from typing import Annotated

import typer
from loraplex_common.errors import LoraplexError
from loraplex_common.sizes import format_size
from rich.table import Table

from loraplex_client._connection import DEFAULT_TARGET, Connection, engine_beside
from loraplex_client._engines import EngineStatus, HeldAdapter, engine_status
from loraplex_client.cli.context import Credentials, StoreTarget, Target, connect, stderr, stdout
from loraplex_client.resources import Model


def status(
    context: typer.Context,
    target: Target = DEFAULT_TARGET,
    store_target: StoreTarget = None,
    engine_target: Annotated[
        list[str] | None,
        typer.Option(
            envvar="LORAPLEX_ENGINE_TARGET",
            help="An engine's gRPC address, may be given again (default: the gateway's host, port 8520).",
            metavar="HOST:PORT",
        ),
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option(envvar="LORAPLEX_REDIS_URL", help="Find all engines in this Valkey's registry.")
    ] = None,
) -> None:
    """Show models, engines with their load, and where each adapter is. Fails if a part does not answer."""
    targets = engine_target or ([engine_beside(target)] if redis_url is None else [])
    problems: list[str] = []
    if redis_url is not None:
        try:
            targets += asyncio.run(_registered_engines(redis_url))
        except ConnectionError as error:
            problems.append(f"valkey: {error}")
    engines = _ask_engines(targets, context.obj, problems)
    stdout.print(_engine_table(engines))
    with connect(context, target, store_target) as client:
        try:
            models = client.list_models()
        except LoraplexError as error:
            problems.append(f"gateway: {error.message}")
        else:
            stdout.print()
            stdout.print(_model_table(models, engines))
    for problem in problems:
        stderr.print(f"error: {problem}", soft_wrap=True)
    if problems:
        raise typer.Exit(1)


def _ask_engines(targets: list[str], credentials: Credentials, problems: list[str]) -> list[EngineStatus]:
    """Return what engines say of themselves; adds to ``problems`` what is wrong with those that do not."""
    engines: list[EngineStatus] = []
    if not targets and not problems:
        problems.append("no engine is registered")
    for target in targets:
        connection = Connection(
            target=target,
            api_key=credentials.api_key,
            tls_ca=credentials.tls_ca,
            tls_cert=credentials.tls_cert,
            tls_key=credentials.tls_key,
        )
        try:
            engines.append(engine_status(connection))
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
            f"{engine.backend} {engine.dtype}",
            str(engine.running),
            str(engine.waiting),
            f"{engine.tokens_per_s:.1f}",
            format_size(engine.pages_total * engine.page_bytes),
            f"{engine.pages_kv}/{engine.pages_adapter}/{engine.pages_pinned}/{engine.pages_free}",
        )
    return table


def _model_table(models: list[Model], engines: list[EngineStatus]) -> Table:
    table = Table("MODEL", "BASE", "REVISION", "LABELS", "RESIDENCY", box=None)
    for model in models:
        held = [adapter for engine in engines for adapter in engine.adapters if adapter.digest == model.revision]
        table.add_row(
            model.name,
            model.base_model if model.is_adapter else "(base)",
            model.revision[:12] or "-",
            ", ".join(sorted(model.aliases)),
            _residency(held) if model.is_adapter and engines else "-",
        )
    return table


def _residency(held: list[HeldAdapter]) -> str:
    on_device = [adapter for adapter in held if adapter.is_on_device]
    if on_device:
        leases = sum(adapter.num_leases for adapter in on_device)
        pages = on_device[0].num_pages
        return f"device on {len(on_device)}, {pages} pages, {leases} leases"
    return f"arena on {len(held)}" if held else "store"


async def _registered_engines(redis_url: str) -> list[str]:
    """Return the targets of all engines whose lease is good.

    Raises:
        ConnectionError: If Valkey does not answer.
    """
    from loraplex_common.registry import RegistryReader
    from loraplex_common.valkey import connect as connect_valkey
    from redis.exceptions import RedisError

    client = connect_valkey(redis_url)
    try:
        return [record.target for record in (await RegistryReader(client).read()).values()]
    except RedisError as error:
        raise ConnectionError(str(error)) from error
    finally:
        await client.aclose()
