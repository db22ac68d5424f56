"""The options of ``loraplex serve`` in groups, and what the parts are started with for them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

import typer
from loraplex_common.hub_base import hub_base

from loraplex_client.cli.context import stderr
from loraplex_client.cli.registered import refuse_password_in_view
from loraplex_client.demo import SMOLLM2_HUB_ID
from loraplex_client.serve import (
    DEFAULT_BASE_PORT,
    MAX_NUM_ENGINES,
    EngineShare,
    ValkeyAccess,
    Wanted,
    assign_ports,
    require_free_ports,
    share_out,
    this_machine,
)
from loraplex_client.serve.ports import Ports

DataDir = Annotated[
    Path | None, typer.Option(help="Keeps imported adapters and logs.", metavar="DIR", envvar="LORAPLEX_DATA_DIR")
]
ImportRoots = Annotated[
    list[Path] | None, typer.Option(help="Folder below which the store may import; may be given again.")
]


class StackAccess(TypedDict):
    """What `ServeConfig` says of access."""

    metrics_key: str | None
    metrics_key_file: Path | None
    user_keys: Path | None


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseOptions:
    """The base model."""

    model: Annotated[
        Path | None,
        typer.Option(help="Base model in Hugging Face layout, or ORG/NAME[@COMMIT] of the hub.", metavar="DIR"),
    ] = None
    demo: Annotated[
        bool, typer.Option("--demo", help="Fetch a small base model, import the five adapters of examples/demo.")
    ] = False
    demo_dir: Annotated[
        Path | None, typer.Option(help="Where examples/demo is, if not in a checkout.", metavar="DIR")
    ] = None
    served_model_name: Annotated[str | None, typer.Option(help="Name clients use (default: the directory's).")] = None
    model_alias: Annotated[
        list[str] | None, typer.Option(help="Further name under which adapters may name the base; may be given again.")
    ] = None
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Serve the text part of a multimodal base model, without images.")
    ] = False

    def check(self) -> None:
        """Refuse two base models, and none."""
        if (self.model is None) == (not self.demo):
            raise typer.BadParameter("give exactly one of --model DIR and --demo")

    @property
    def hub_name(self) -> str | None:
        """The repository's name, if the base model is one of the hub's."""
        parts = hub_base(self.model)
        return parts["repo"] if parts else None

    def flags(self) -> tuple[str, ...]:
        """Return the names of the base model, and what is served of it, for all services."""
        aliases = [*(self.model_alias or ()), *([SMOLLM2_HUB_ID] if self.demo else ())]
        names = flags({"--served-model-name": self.served_model_name or self.hub_name}, ("--model-alias", aliases))
        return (*names, *(("--text-only",) if self.text_only else ()))


@dataclass(frozen=True, kw_only=True, slots=True)
class AddressOptions:
    """Where the parts listen."""

    host: Annotated[str, typer.Option(help="Address the gateway listens on.")] = "127.0.0.1"
    base_port: Annotated[
        int, typer.Option(help="First of the ports below: moves all that are not given; 0 picks free ones.")
    ] = DEFAULT_BASE_PORT
    port: Annotated[int | None, typer.Option(help="gRPC port (default: the base port).")] = None
    http_port: Annotated[int | None, typer.Option(help="OpenAI-compatible HTTP port (default: base + 1).")] = None
    metrics_port: Annotated[int | None, typer.Option(help="The gateway's /metrics port (base + 2).")] = None
    store_port: Annotated[int | None, typer.Option(help="The adapter store's gRPC port (base + 10).")] = None
    store_metrics_port: Annotated[int | None, typer.Option(help="The adapter store's /metrics port (base + 11).")] = (
        None
    )
    engine_port: Annotated[
        int | None, typer.Option(help="The engine's gRPC port (base + 20; each further engine's is 2 higher).")
    ] = None
    engine_metrics_port: Annotated[
        int | None, typer.Option(help="The engine's /metrics port (base + 21; each further engine's is 2 higher).")
    ] = None

    def ports(self, num_engines: int) -> Ports:
        """Return the port of each part, by its name in `ServeConfig`; check that all of them are free.

        Raises:
            PortError: If a number is no port, or cannot be listened on.
        """
        given = {
            "grpc_port": self.port,
            "http_port": self.http_port,
            "metrics_port": self.metrics_port,
            "store_port": self.store_port,
            "store_metrics_port": self.store_metrics_port,
            "engine_port": self.engine_port,
            "engine_metrics_port": self.engine_metrics_port,
        }
        ports = assign_ports(self.base_port, given, num_engines)
        require_free_ports(self.host, ports, num_engines)
        return ports


@dataclass(frozen=True, kw_only=True, slots=True)
class ValkeyOptions:
    """Which Valkey is used."""

    redis_url: Annotated[
        str | None,
        typer.Option(help="Use this Valkey or Redis instead of an embedded one.", envvar="LORAPLEX_REDIS_URL"),
    ] = None
    redis_password_file: Annotated[
        Path | None, typer.Option(help="Its password.", metavar="FILE", envvar="LORAPLEX_REDIS_PASSWORD_FILE")
    ] = None
    redis_tls_ca: Annotated[
        Path | None,
        typer.Option(help="Trust its certificate by this, PEM.", metavar="FILE", envvar="LORAPLEX_REDIS_TLS_CA"),
    ] = None

    def access(self, context: typer.Context) -> ValkeyAccess | None:
        """Return how it is reached; None for an embedded one."""
        password_file, tls_ca = self.redis_password_file, self.redis_tls_ca
        if self.redis_url is None:
            if password_file or tls_ca:
                raise typer.BadParameter("--redis-password-file and --redis-tls-ca go with a --redis-url")
            return None
        refuse_password_in_view(context, self.redis_url)
        return ValkeyAccess(url=self.redis_url, password_file=_absolute(password_file), tls_ca=_absolute(tls_ca))


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How many engines there are, and what each of them computes with."""

    engines: Annotated[
        int,
        typer.Option(
            min=1,
            max=MAX_NUM_ENGINES,
            help="Engines, each with GPUs of its own, or its share of the CPU's threads (docs/deploy.md).",
        ),
    ] = 1
    pool_bytes: Annotated[
        str | None, typer.Option(help="Device memory of each engine for KV and adapter pages, e.g. 2GiB.")
    ] = None
    arena_bytes: Annotated[
        str | None, typer.Option(help="Host memory of each engine for adapter images, e.g. 1GiB.")
    ] = None
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None
    quantization: Annotated[
        str | None, typer.Option(help="What becomes of the weights: auto, fp8 or none; see docs/stored-forms.md.")
    ] = None
    kv_cache_dtype: Annotated[str | None, typer.Option(help="Type of keys and values: auto or fp8.")] = None
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.", envvar="LORAPLEX_ENGINE_DEVICE")] = None
    num_threads: Annotated[
        int | None,
        typer.Option(
            envvar="LORAPLEX_ENGINE_NUM_THREADS",
            help="Compute threads on a CPU of each engine's process (default: all cores, divided among them).",
        ),
    ] = None
    tensor_parallel: Annotated[
        int | None,
        typer.Option(
            min=1,
            envvar="LORAPLEX_ENGINE_TENSOR_PARALLEL",
            help="Processes of an engine that compute the model together, each with a part of every weight.",
        ),
    ] = None
    adapter_split: Annotated[
        str | None,
        typer.Option(help="How these divide adapters' pairs: auto, whole or divided; see docs/tensor_parallel.md."),
    ] = None
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence in tokens.")] = None
    max_num_seqs: Annotated[int | None, typer.Option(help="Most sequences of one step.")] = None
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Most tokens of one step.")] = None

    def shares(self) -> tuple[EngineShare, ...]:
        """Return what each engine gets of this machine.

        Raises:
            ShareError: If there are too few GPUs.
        """
        if self.engines == 1:
            return (EngineShare(),)
        wanted = Wanted(
            num_engines=self.engines,
            degree=self.tensor_parallel or 1,
            device=self.device or "auto",
            num_threads=self.num_threads,
        )
        return share_out(this_machine(), wanted, lambda line: stderr.print(line, soft_wrap=True))

    def flags(self) -> tuple[str, ...]:
        """Return every engine's arguments."""
        return flags(
            {
                "--pool-bytes": self.pool_bytes,
                "--arena-bytes": self.arena_bytes,
                "--dtype": self.dtype,
                "--quantization": self.quantization,
                "--kv-cache-dtype": self.kv_cache_dtype,
                "--device": self.device,
                "--num-threads": self.num_threads,
                "--tensor-parallel": self.tensor_parallel,
                "--adapter-split": self.adapter_split,
                "--max-model-len": self.max_model_len,
                "--max-num-seqs": self.max_num_seqs,
                "--max-num-batched-tokens": self.max_num_batched_tokens,
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AccessOptions:
    """Which callers are let in, how far, how they are sure of the gateway, and whether it shows them a page."""

    api_keys_file: Annotated[Path | None, typer.Option(help="Ask clients for one of these API keys.")] = None
    quotas_file: Annotated[Path | None, typer.Option(help="Limits of tenants, TOML; see docs/quotas.md.")] = None
    tls_cert: Annotated[Path | None, typer.Option(help="The gateway's certificate, PEM.")] = None
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None
    metrics_key_file: Annotated[
        Path | None,
        typer.Option(
            help="Show scrapers that send the key in this file restricted adapters and tenants (or LORAPLEX_METRICS_KEY).",
            envvar="LORAPLEX_METRICS_KEY_FILE",
            metavar="FILE",
        ),
    ] = None
    ui: Annotated[bool, typer.Option("--ui", help="Show the page at /ui: page pools, requests, a playground.")] = False

    @property
    def is_public(self) -> bool:
        """Whether the gateway lets every caller in."""
        return self.api_keys_file is None and self.tls_cert is None

    def of_stack(self) -> StackAccess:
        """Return what the stack itself has to know."""
        return StackAccess(
            metrics_key=_metrics_key(self.metrics_key_file),
            metrics_key_file=_absolute(self.metrics_key_file),
            user_keys=_absolute(self.api_keys_file),
        )

    def store_flags(self) -> tuple[str, ...]:
        """Return the adapter store's arguments."""
        return flags({"--quotas-file": self.quotas_file})

    def gateway_flags(self) -> tuple[str, ...]:
        """Return the gateway's arguments."""
        given = {"--api-keys-file": self.api_keys_file, "--tls-cert": self.tls_cert, "--tls-key": self.tls_key}
        return (*flags(given), *self.store_flags(), *(("--ui",) if self.ui else ()))


def flags(options: Mapping[str, object], *repeated: tuple[str, list[str] | tuple[str, ...]]) -> tuple[str, ...]:
    """Return the options that were given as words of a command line."""
    words = [word for flag, value in options.items() if value is not None for word in (flag, str(value))]
    return (*words, *(word for flag, values in repeated for value in values for word in (flag, value)))


def _metrics_key(file: Path | None) -> str | None:
    """Return the key that the environment has instead of a file."""
    key = os.environ.get("LORAPLEX_METRICS_KEY")
    if key and file:
        raise typer.BadParameter("both --metrics-key-file and LORAPLEX_METRICS_KEY are given: which of the two counts?")
    return key or None


def _absolute(path: Path | None) -> Path | None:
    """Return a path that means the same in every process."""
    return None if path is None else path.expanduser().absolute()
