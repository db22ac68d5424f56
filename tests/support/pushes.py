"""Adapters in memory, as a trainer has them, for pushes."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from loraplex_client import AsyncClient
from loraplex_client._push_messages import push_of
from loraplex_common.base_model import load_base_model
from loraplex_common.kept_status import answer_of
from loraplex_common.valkey import connect
from support.adapters import Recipe, adapter_config, adapter_tensors
from support.store_engine_peer import attached_peer
from support.store_rig import tiny_base_dir, translated
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from loraplex.v1 import adapter_store_pb2 as pb
    from loraplex_client import AsyncAdapters
    from support.store_engine_peer import EnginePeer
    from support.store_rig import StoreClient


def tensors_of(seed: int, base_dir: Path | None = None, **recipe: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors (fp32, numpy) and adapter_config.json of a random adapter."""
    made = Recipe(seed=seed, **recipe)
    return dict(adapter_tensors(load_base_model(base_dir or tiny_base_dir()), made)), adapter_config(made)


def push_messages(name: str, seed: int, **options: Any) -> list[pb.PushAdapterRequest]:
    """Return the messages of a push of a random adapter."""
    defaults: dict[str, Any] = {
        "label": "",
        "expected": None,
        "stage": False,
        "ready_timeout_s": None,
        "base_model": "",
    }
    return list(push_of(name, *tensors_of(seed), **defaults | options).messages())


@asynccontextmanager
async def adapters_at(port: int) -> AsyncIterator[AsyncAdapters]:
    """Give out the adapters of a store on this machine."""
    async with AsyncClient("127.0.0.1:1", store_target=f"127.0.0.1:{port}") as client:
        yield client.adapters


async def send(client: StoreClient, messages: list[pb.PushAdapterRequest]) -> pb.PushAdapterResponse:
    """Push messages as they are."""
    with translated():
        response: pb.PushAdapterResponse = await answer_of(client.stub.PushAdapter(iter(messages)))
    return response


def attached(client: StoreClient, **options: Any) -> Any:
    """Return an engine's peer that attaches to the store."""
    return attached_peer(client.channel, load_base_model(tiny_base_dir()), **options)


async def hold(peer: EnginePeer, digest: str) -> None:
    """Have an engine ask for a revision and get it."""
    peer.want(digest)
    await peer.image(digest)


async def latest(client: StoreClient, name: str = "a") -> str:
    """Return the digest of the revision that a name means."""
    return (await client.get(name)).revision.revision


async def assert_no_blob(redis_url: str, *, but: int = 0) -> None:
    """Wait until no weights but those of some revisions are left."""
    valkey = connect(redis_url)

    async def is_collected() -> bool:
        return len(await valkey.keys("a:*:m")) == but

    await eventually(is_collected, what="blobs collected")
    await valkey.aclose()
