"""An engine that attaches speaks for itself alone: its id is its principal's for as long as it is attached."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex.v1 import adapter_store_pb2_grpc
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import RoleForbiddenError
from loraplex_common.grpc_channel import open_channel
from support.store_engine_peer import EnginePeer
from support.store_rig import running_rig, store_config, tiny_base_dir, translated
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from loraplex_adapter_store.service import RunningStore

LINES = ("one engine-1 engine", "two engine-2 engine", "spare engine-1 engine")


@pytest.fixture
async def store(valkey_url: str, tmp_path: Path) -> AsyncIterator[RunningStore]:
    (tmp_path / "keys").write_text("\n".join(LINES))
    async with running_rig(store_config(valkey_url, api_keys_file=tmp_path / "keys")) as (store, _):
        yield store


@asynccontextmanager
async def attached(store: RunningStore, key: str) -> AsyncIterator[Any]:
    """Attach an engine with the id ``e-1`` under a key; give out the welcomed call."""
    base = load_base_model(tiny_base_dir())
    peer = EnginePeer(base, base.geometry(dtype="float32", page_bytes=4096), 4, "e-1")
    async with open_channel(f"127.0.0.1:{store.grpc_port}", api_key=key) as channel:
        call = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel).AttachEngine(timeout=20)
        await call.write(pb.AttachEngineRequest(hello=peer.hello()))
        response: Any = await call.read()
        assert response.HasField("welcome")
        yield call
    peer.close()


async def test_an_engine_id_is_not_taken_over_by_another_principal(store: RunningStore) -> None:
    async with attached(store, "one") as call:
        with pytest.raises(RoleForbiddenError, match="attached by another principal"), translated():
            async with attached(store, "two"):
                pass

        assert "e-1" in store.attached
        assert not call.done()


async def test_an_engine_that_attaches_again_takes_its_own_place_with_whichever_key(store: RunningStore) -> None:
    async with attached(store, "one") as first, attached(store, "spare") as second:
        while await first.read() is not grpc.aio.EOF:
            pass

        assert not second.done()
        assert store.attached.ids() == ["e-1"]


async def test_an_id_is_free_again_once_its_engine_is_gone(store: RunningStore) -> None:
    async with attached(store, "one"):
        pass
    await eventually(lambda: "e-1" not in store.attached)

    async with attached(store, "two"):
        assert "e-1" in store.attached
