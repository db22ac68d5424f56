"""``loraplex serve``: everything on this machine."""

import asyncio
import signal
from pathlib import Path
from typing import Annotated, Final

import grpc
import typer
from loraplex_common.errors import LoraplexError

from loraplex_client._aio.client import AsyncClient
from loraplex_client.cli.context import progress_bars, stderr
from loraplex_client.cli.model import ensure_with_progress
from loraplex_client.cli.serve_options import (
    absolute,
    check_base,
    check_directories,
    demo_adapters,
    flags,
    metrics_key,
    valkey,
)
from loraplex_client.demo import SMOLLM2_HUB_ID
from loraplex_client.resources import ImportProgress
from loraplex_client.serve import (
    DEFAULT_BASE_PORT,
    ServeConfig,
    Stack,
    assign_ports,
    default_data_dir,
    require_free_ports,
)

PROBE_TIMEOUT_S: Final = 120.0
PROBE_PAUSE_S: Final = 0.2


def serve(
    context: typer.Context,
    model: Annotated[Path | None, typer.Option(help="Base model in Hugging Face layout.", metavar="DIR")] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Fetch a small base model, import the five adapters of examples/demo.")
    ] = False,
    demo_dir: Annotated[
        Path | None, typer.Option(help="Where examples/demo is, if not in a checkout.", metavar="DIR")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name clients use (default: the directory's).")] = None,
    model_alias: Annotated[
        list[str] | None, typer.Option(help="Further name under which adapters may name the base; may be given again.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address the gateway listens on.")] = "127.0.0.1",
    base_port: Annotated[
        int, typer.Option(help="First of the ports below: moves all that are not given; 0 picks free ones.")
    ] = DEFAULT_BASE_PORT,
    port: Annotated[int | None, typer.Option(help="gRPC port (default: the base port).")] = None,
    http_port: Annotated[int | None, typer.Option(help="OpenAI-compatible HTTP port (default: base + 1).")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="The gateway's /metrics port (base + 2).")] = None,
    store_port: Annotated[int | None, typer.Option(help="The adapter store's gRPC port (base + 10).")] = None,
    store_metrics_port: Annotated[
        int | None, typer.Option(help="The adapter store's /metrics port (base + 11).")
    ] = None,
    engine_port: Annotated[int | None, typer.Option(help="The engine's gRPC port (base + 20).")] = None,
    engine_metrics_port: Annotated[int | None, typer.Option(help="The engine's /metrics port (base + 21).")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Keeps imported adapters and logs.", metavar="DIR", envvar="LORAPLEX_DATA_DIR")
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(help="Use this Valkey or Redis instead of an embedded one.", envvar="LORAPLEX_REDIS_URL"),
    ] = None,
    redis_password_file: Annotated[
        Path | None, typer.Option(help="Its password.", metavar="FILE", envvar="LORAPLEX_REDIS_PASSWORD_FILE")
    ] = None,
    redis_tls_ca: Annotated[
        Path | None,
        typer.Option(help="Trust its certificate by this, PEM.", metavar="FILE", envvar="LORAPLEX_REDIS_TLS_CA"),
    ] = None,
    import_root: Annotated[
        list[Path] | None, typer.Option(help="Folder below which the store may import; may be given again.")
    ] = None,
    pool_bytes: Annotated[str | None, typer.Option(help="Device memory for KV and adapter pages, e.g. 2GiB.")] = None,
    arena_bytes: Annotated[str | None, typer.Option(help="Host memory for adapter images, e.g. 1GiB.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    num_threads: Annotated[int | None, typer.Option(help="Compute threads on a CPU (default: all cores).")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence in tokens.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Most sequences of one step.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Most tokens of one step.")] = None,
    api_keys_file: Annotated[Path | None, typer.Option(help="Ask clients for one of these API keys.")] = None,
    quotas_file: Annotated[Path | None, typer.Option(help="Limits of tenants, TOML; see docs/quotas.md.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="The gateway's certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    metrics_key_file: Annotated[
        Path | None,
        typer.Option(
            help="Show scrapers that send the key in this file restricted adapters and tenants (or LORAPLEX_METRICS_KEY).",
            envvar="LORAPLEX_METRICS_KEY_FILE",
            metavar="FILE",
        ),
    ] = None,
    enable_reflection: Annotated[
        bool, typer.Option("--enable-reflection", help="Serve gRPC reflection, e.g. for grpcurl.")
    ] = False,
    drain_grace_s: Annotated[float, typer.Option(help="How long running requests may go on after Ctrl-C.")] = 10.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Run Valkey, adapter store, engine and gateway on this machine until Ctrl-C."""
    if (model is None) == (not demo):
        raise typer.BadParameter("give exactly one of --model DIR and --demo")
    ports = assign_ports(
        base_port,
        {
            "grpc_port": port,
            "http_port": http_port,
            "metrics_port": metrics_port,
            "store_port": store_port,
            "store_metrics_port": store_metrics_port,
            "engine_port": engine_port,
            "engine_metrics_port": engine_metrics_port,
        },
    )
    require_free_ports(host, ports)
    check_directories(model, import_root or [])
    adapters = demo_adapters(demo_dir) if demo else {}
    base = ensure_with_progress() if model is None else model
    check_base(base, log_level)
    aliases = [*(model_alias or ()), *([SMOLLM2_HUB_ID] if demo else ())]
    engine_options = {
        "--pool-bytes": pool_bytes,
        "--arena-bytes": arena_bytes,
        "--dtype": dtype,
        "--device": device,
        "--num-threads": num_threads,
        "--max-model-len": max_model_len,
        "--max-num-seqs": max_num_seqs,
        "--max-num-batched-tokens": max_num_batched_tokens,
    }
    quota_options = {"--quotas-file": quotas_file}
    gateway_options = {"--api-keys-file": api_keys_file, "--tls-cert": tls_cert, "--tls-key": tls_key, **quota_options}
    config = ServeConfig(
        model=base.resolve(),
        data_dir=(data_dir or default_data_dir()).resolve(),
        valkey=valkey(context, redis_url, redis_password_file, redis_tls_ca),
        host=host,
        **ports,
        import_roots=tuple(root.resolve() for root in import_root or ()),
        drain_grace_s=drain_grace_s,
        log_level=log_level,
        metrics_key=metrics_key(metrics_key_file),
        metrics_key_file=absolute(metrics_key_file),
        user_keys=absolute(api_keys_file),
        base_args=(
            *flags({"--served-model-name": served_model_name}, ("--model-alias", aliases)),
            *(("--enable-reflection",) if enable_reflection else ()),
        ),
        engine_args=flags(engine_options),
        gateway_args=flags(gateway_options),
        store_args=flags(quota_options),
    )
    asyncio.run(_serve(config, adapters, is_public=api_keys_file is None and tls_cert is None))


async def _serve(config: ServeConfig, adapters: dict[str, Path], *, is_public: bool) -> None:
    """Run the stack until a signal; a second one ends it without draining."""
    stack = Stack(config, lambda line: stderr.print(line, style="dim", markup=False, soft_wrap=True))
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
    print(f"  loraplex chat{target}{flag} --temperature 0 '{prompt}'")
    print(f"  curl http://{stack.http}/v1/models")
    print(f"  curl http://{stack.metrics}/metrics")
    print(f"  loraplex status{target}")
    print(f"  loraplex adapters list{store}")
    print(
        f"  adapter store: {stack.store}   engine: {stack.engine}   logs: {config.data_dir / 'logs'}   Ctrl-C stops everything",
        flush=True,
    )
