"""``loraplex serve``: everything on this machine."""

import asyncio
import signal
from pathlib import Path
from typing import Annotated, Final

import grpc
import typer
from loraplex_common.errors import LoraplexError
from loraplex_common.version import version_line

from loraplex_client._aio.client import AsyncClient
from loraplex_client.cli.context import progress_bars, stderr
from loraplex_client.cli.option_groups import grouped
from loraplex_client.cli.serve_checks import check_base, check_directories, demo_adapters, fetched
from loraplex_client.cli.serve_options import (
    AccessOptions,
    AddressOptions,
    BaseOptions,
    DataDir,
    EngineOptions,
    ImportRoots,
    ValkeyOptions,
)
from loraplex_client.resources import ImportProgress
from loraplex_client.serve import (
    ServeConfig,
    Stack,
    default_data_dir,
)

PROBE_TIMEOUT_S: Final = 120.0
PROBE_PAUSE_S: Final = 0.2


@grouped
def serve(
    context: typer.Context,
    *,
    base: BaseOptions,
    address: AddressOptions,
    data_dir: DataDir = None,
    valkey: ValkeyOptions,
    import_root: ImportRoots = None,
    engine: EngineOptions,
    access: AccessOptions,
    enable_reflection: Annotated[
        bool, typer.Option("--enable-reflection", help="Serve gRPC reflection, e.g. for grpcurl.")
    ] = False,
    gateway_workers: Annotated[int, typer.Option(min=1, help="Processes of the gateway, on one pair of ports.")] = 1,
    drain_grace_s: Annotated[float, typer.Option(help="How long running requests may go on after Ctrl-C.")] = 10.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Run Valkey, adapter store, engines and gateway on this machine until Ctrl-C."""
    base.check()
    check_directories(None if base.hub_name else base.model, import_root or [])
    ports, adapters = address.ports(engine.engines), demo_adapters(base.demo_dir) if base.demo else {}
    shares, model = engine.shares(), fetched(base)
    check_base(model, log_level, text_only=base.text_only)
    config = ServeConfig(
        model=model.resolve(),
        data_dir=(data_dir or default_data_dir()).resolve(),
        valkey=valkey.access(context),
        host=address.host,
        **ports,
        import_roots=tuple(root.resolve() for root in import_root or ()),
        drain_grace_s=drain_grace_s,
        log_level=log_level,
        **access.of_stack(),
        base_args=(*base.flags(), *("--enable-reflection",) * enable_reflection),
        engine_args=engine.flags(),
        engine_shares=shares,
        gateway_args=(*access.gateway_flags(), "--workers", str(gateway_workers)),
        store_args=access.store_flags(),
    )
    asyncio.run(_serve(config, adapters, is_public=access.is_public))


async def _serve(config: ServeConfig, adapters: dict[str, Path], *, is_public: bool) -> None:
    """Run the stack until a signal; a second one ends it without draining."""
    stack = Stack(config, lambda line: stderr.print(line, style="dim", soft_wrap=True))
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            stack.kill()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    running = asyncio.create_task(_run(stack, config, adapters, is_public=is_public))
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            stderr.print("stopping", style="dim")
    finally:
        stopped.cancel()
        running.cancel()
        outcome = await asyncio.gather(running, return_exceptions=True)
        await stack.stop()
    if isinstance(outcome[0], Exception):
        raise outcome[0]


async def _run(stack: Stack, config: ServeConfig, adapters: dict[str, Path], *, is_public: bool) -> None:
    """Start everything, say so, and keep it running."""
    await stack.start()
    supervision = asyncio.create_task(stack.run())
    preparation = asyncio.create_task(_prepare(stack, adapters, is_public=is_public))
    try:
        await asyncio.wait({supervision, preparation}, return_when=asyncio.FIRST_COMPLETED)
        if not supervision.done():
            await preparation
            _announce(stack, config, adapters)
        await supervision
    finally:
        supervision.cancel()
        preparation.cancel()
        await asyncio.gather(supervision, preparation, return_exceptions=True)


async def _prepare(stack: Stack, adapters: dict[str, Path], *, is_public: bool) -> None:
    """Import adapters, then wait until a request would be served: a token has come out, every name is known.

    A gateway that asks for credentials is not asked for a token: we have none.
    """
    async with AsyncClient(stack.grpc, store_target=stack.store, profile=stack.profile) as client:
        if adapters:
            with progress_bars() as update:
                for name, directory in adapters.items():

                    def progress(state: ImportProgress, name: str = name) -> None:
                        update(f"import {name}", state.bytes_done, state.bytes_total)

                    await client.adapters.upload(name, directory, progress=progress)
        if not is_public:
            return
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            while not await _serves(client, set(adapters)):  # noqa: ASYNC110 -- the gateway has no event for it
                await asyncio.sleep(PROBE_PAUSE_S)


async def _serves(client: AsyncClient, names: set[str]) -> bool:
    """Return whether the gateway has an engine and knows these adapters."""
    try:
        await client.generate_once(prompt_token_ids=[0], max_new_tokens=1, ignore_eos=True)
        return names <= {model.name for model in await client.list_models()}
    except LoraplexError as error:
        if error.code is grpc.StatusCode.UNAVAILABLE:
            return False
        raise


def _announce(stack: Stack, config: ServeConfig, adapters: dict[str, Path]) -> None:
    name = "json" if "json" in adapters else next(iter(adapters), None)
    flag = f" --adapter {name}" if name else ""
    target = "" if stack.grpc.endswith(":8500") else f" --target {stack.grpc}"
    store = "" if stack.store.endswith(":8510") else f" --store-target {stack.store}"
    prompt = "Remind me to call Ada about the demo tomorrow at 9 am"
    print(f"ready: grpc={stack.grpc} http={stack.http}", flush=True)
    print(f"  {version_line('loraplex')}")
    print(f"  loraplex chat{target}{flag} --temperature 0 '{prompt}'")
    print(f"  curl http://{stack.http}/v1/models")
    print(f"  curl http://{stack.metrics}/metrics   engine metrics: {' '.join(stack.engine_metrics)}")
    print(f"  loraplex status{target}")
    if "--ui" in config.gateway_args:
        print(f"  http://{stack.http}/ui shows pages, adapters and requests, and asks adapters side by side")
    print(f"  loraplex adapters list{store}")
    engines = f"engine{'s' if len(stack.engines) > 1 else ''}: {' '.join(stack.engines)}"
    print(
        f"  adapter store: {stack.store}   {engines}   logs: {config.data_dir / 'logs'}   Ctrl-C stops everything",
        flush=True,
    )
