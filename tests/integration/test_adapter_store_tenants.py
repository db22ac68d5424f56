"""Tenants of one adapter store: one that may not use an adapter learns nothing of it, one that may, of no other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest
from grpc import StatusCode
from loraplex.v1 import adapter_pb2
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.grpc_channel import open_channel
from loraplex_common.rpc_errors import error_from_rpc
from support.store_rig import StoreClient, running_rig, store_config

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("suffix", ["", ":latest", ":nope", "@" + "12" * 32])
async def test_a_restricted_adapter_is_to_others_as_one_that_does_not_exist(
    valkey_url: str, tmp_path: Path, suffix: str
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("root ops admin\nalice team-a\nbob team-b\n")
    async with running_rig(store_config(valkey_url, api_keys_file=keys), api_key="root") as (store, admin):
        created = adapter_pb2.Adapter(name="private", allowed_tenants=["team-a", "team-c"])
        await admin.stub.CreateAdapter(pb.CreateAdapterRequest(adapter=created))
        await admin.upload_recipe("private")
        async with open_channel(f"127.0.0.1:{store.grpc_port}", api_key="bob") as channel:
            bob, told = StoreClient(channel=channel), []
            for name in ("private", "prixxte"):
                for call in (
                    bob.stub.GetAdapter(pb.GetAdapterRequest(name=f"{name}{suffix}")),
                    bob.stub.GetAdapterReport(pb.GetAdapterReportRequest(name=f"{name}{suffix}")),
                    bob.stub.ListAdapterRevisions(pb.ListAdapterRevisionsRequest(name=name)),
                    bob.stub.DeleteAdapter(pb.DeleteAdapterRequest(name=name)),
                ):
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await call
                    error = error_from_rpc(caught.value)
                    said = error.message.replace(name, "NAME")
                    told.append((error.code, error.reason, said, error.metadata, error.violations))

        assert told[:4] == told[4:]
        assert [status for status, *_ in told[:4]] == [
            StatusCode.NOT_FOUND,
            StatusCode.NOT_FOUND,
            StatusCode.NOT_FOUND,
            StatusCode.PERMISSION_DENIED,
        ]


async def test_who_may_use_an_adapter_does_not_learn_who_else_may(valkey_url: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("root ops admin\nalice team-a\n")
    async with running_rig(store_config(valkey_url, api_keys_file=keys), api_key="root") as (store, admin):
        created = adapter_pb2.Adapter(name="private", allowed_tenants=["team-a", "team-c"])
        await admin.stub.CreateAdapter(pb.CreateAdapterRequest(adapter=created))
        async with open_channel(f"127.0.0.1:{store.grpc_port}", api_key="alice") as channel:
            stub = StoreClient(channel=channel).stub
            shown = [(await stub.GetAdapter(pb.GetAdapterRequest(name="private"))).adapter]
            shown += (await stub.ListAdapters(pb.AdapterStoreServiceListAdaptersRequest())).adapters
        whole = (await admin.stub.GetAdapter(pb.GetAdapterRequest(name="private"))).adapter

        assert [list(adapter.allowed_tenants) for adapter in shown] == [["team-a"]] * 2
        assert whole.allowed_tenants == ["team-a", "team-c"]
