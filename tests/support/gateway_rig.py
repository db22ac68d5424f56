"""A gateway in this process, with doubles of its peers and a real Valkey."""

from __future__ import annotations

import asyncio
import functools
import tempfile
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from loraplex.v1 import engine_pb2, gateway_pb2, gateway_pb2_grpc
from loraplex_common import valkey
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import LoraplexError
from loraplex_common.grpc_channel import open_channel
from loraplex_gateway.app import GatewayApp
from loraplex_gateway.config import GatewayConfig
from redis.asyncio import Redis
from support.base_models import TinyBase, write_base_model
from support.engine_double import EngineDouble, StoreDouble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from loraplex_common.base_model import BaseModelInfo


MODEL_NAME = "tiny"
DIGEST = "ab" * 32
OTHER_DIGEST = "cd" * 32


@functools.cache
def model_directory() -> Path:
    """Return a tiny base model, written once per process."""
    directory = Path(tempfile.mkdtemp(prefix="loraplex-gateway-")) / MODEL_NAME
    return write_base_model(directory, TinyBase())


def letters(submit: engine_pb2.Submit) -> Sequence[int]:
    """Return an output that depends only on the prompt: printable byte tokens, counting up from its length."""
    first = len(submit.prompt_token_ids)
    return [10 + (first + n) % 60 for n in range(submit.stopping.max_new_tokens)]


@dataclass(kw_only=True)
class Rig:
    """The objects that a test uses."""

    app: GatewayApp
    engines: list[EngineDouble]
    store: StoreDouble
    valkey: Redis
    channel: grpc.aio.Channel

    @property
    def stub(self) -> gateway_pb2_grpc.GatewayServiceAsyncStub:
        """A client of the gateway."""
        return gateway_pb2_grpc.GatewayServiceStub(self.channel)

    @property
    def http(self) -> str:
        """Base URL of the HTTP port."""
        return f"http://127.0.0.1:{self.app.http_port}"

    @property
    def metrics(self) -> str:
        """URL of /metrics."""
        return f"http://127.0.0.1:{self.app.metrics_port}/metrics"

    @property
    def engine(self) -> EngineDouble:
        """The first engine."""
        return self.engines[0]

    def check_idle(self) -> None:
        """Raise if anything of a request is left."""
        self.app.pool.check_integrity()
        self.app.admission.check_integrity()
        assert self.app.admission.num_running == self.app.admission.num_waiting == 0
        assert self.app.claims.num_running == 0
        assert sum(link.num_in_flight for link in self.app.pool.links) == 0


def make_config(valkey_url: str, **overrides: Any) -> GatewayConfig:
    """Return a configuration for tests: free ports, and no waiting at the end."""
    defaults: dict[str, Any] = {
        "model": (model_directory(),),
        "redis_url": valkey_url,
        "port": 0,
        "http_port": 0,
        "metrics_port": 0,
        "drain_settle_s": 0.0,
        "drain_grace_s": 5.0,
    }
    return GatewayConfig(**{**defaults, **overrides})


@asynccontextmanager
async def running_gateway(
    valkey_url: str,
    *,
    num_engines: int = 1,
    reply: Callable[[engine_pb2.Submit], Sequence[int]] = letters,
    base: BaseModelInfo | None = None,
    resident_on: dict[int, set[str]] | None = None,
    channel_options: dict[str, Any] | None = None,
    max_model_len: int = 512,
    numerics: Sequence[str] = (),
    **overrides: Any,
) -> AsyncIterator[Rig]:
    """Run a gateway with engine doubles; adapter `poet` has the labels latest and prod, `secret` is for tenant vip.

    Where `numerics` are given, there is an engine for each.
    """
    num_engines = len(numerics) or num_engines
    base = base or load_base_model(model_directory())
    store = StoreDouble()  # type: ignore[abstract]  # the two calls that a gateway makes
    await store.start()
    store.put("poet", {"latest": DIGEST, "prod": OTHER_DIGEST}, fingerprint=base.fingerprint)
    store.put("secret", {"latest": DIGEST}, fingerprint=base.fingerprint, allowed=["vip"])
    store.put("stranger", {"latest": "ef" * 32}, fingerprint="00" * 32)
    client = valkey.connect(valkey_url)
    engines = [
        EngineDouble(base=base, reply=reply, resident=(resident_on or {}).get(n, set()), max_model_len=max_model_len)
        for n in range(num_engines)
    ]
    for engine, said in zip(engines, numerics or ["bf16"] * num_engines, strict=True):
        engine.numerics = said
        await engine.start()
        await engine.register(client)
    overrides.setdefault("store_target", f"127.0.0.1:{store.port}")
    app = GatewayApp(make_config(valkey_url, **overrides))
    try:
        await app.start()
        await _all_open(app, num_engines)
        channel = open_channel(f"127.0.0.1:{app.grpc_port}", **(channel_options or {}))
        async with channel:
            yield Rig(app=app, engines=engines, store=store, valkey=client, channel=channel)
    finally:
        await app.close()
        for engine in engines:
            with suppress(LoraplexError):  # some tests stop Valkey
                await engine.unregister(client)
            await engine.kill()
        await store.kill()
        await client.aclose()


async def _all_open(app: GatewayApp, num_engines: int) -> None:
    async with asyncio.timeout(10):
        while sum(link.is_candidate for link in app.pool.links) < num_engines:
            await app.pool.changed.wait()


def text_request(text: str = "the quick", **fields: Any) -> gateway_pb2.GenerateRequest:
    """Return a request for eight tokens."""
    fields.setdefault("stopping", gateway_pb2.StoppingParams(max_new_tokens=8))
    return gateway_pb2.GenerateRequest(text=text, **fields)
