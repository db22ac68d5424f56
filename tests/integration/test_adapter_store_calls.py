"""Calls of the store over gRPC: repeated ones, operations, watches, downloads, and the roles that may make them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import crc32c
import pytest
from google.longrunning import operations_pb2
from loraplex.v1 import adapter_pb2
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.errors import (
    AdapterNotFoundError,
    AlreadyExistsError,
    InvalidParameterError,
    LoraplexError,
    RoleForbiddenError,
    SequenceGapError,
    UnauthenticatedError,
)
from loraplex_common.grpc_channel import open_channel
from loraplex_common.valkey import connect
from safetensors.numpy import load
from support.adapters import Recipe, write_adapter
from support.store_rig import (
    StoreClient,
    delete,
    new_id,
    refused,
    running_rig,
    set_alias,
    store_config,
    tiny_base_dir,
    translated,
)
from support.valkey import running_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


pytestmark = pytest.mark.integration


@pytest.fixture
async def client(redis_url: str, tmp_path: Path) -> AsyncIterator[StoreClient]:
    async with running_rig(store_config(redis_url, import_root=(tmp_path,))) as (_, client):
        yield client


async def test_a_repeated_call_changes_nothing(client: StoreClient, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", tiny_base_dir())
    ids = [new_id() for _ in range(4)]
    first = await client.import_dir("a", folder, request_id=ids[0])
    again = await client.import_dir("a", folder, request_id=ids[0])
    assert again.adapter.etag == first.adapter.etag == "v1"

    upload = await client.upload_recipe("b", request_id=ids[1])
    assert (await client.upload_recipe("b", request_id=ids[1])).adapter.etag == upload.adapter.etag

    alias = await set_alias(client, "a", "prod", first.revision.revision, request_id=ids[2])
    repeated = await set_alias(client, "a", "prod", first.revision.revision, request_id=ids[2])
    assert repeated.adapter.etag == alias.adapter.etag

    assert (await delete(client, "a", request_id=ids[3])).etag == (await delete(client, "a", request_id=ids[3])).etag
    with refused(AlreadyExistsError, "was used to delete 'a'"):
        await delete(client, "b", request_id=ids[3])
    with refused(InvalidParameterError, "no UUID"):
        await delete(client, "b", request_id="mine")


async def test_a_request_id_is_good_for_one_call_only(client: StoreClient, tmp_path: Path) -> None:
    one, other = (write_adapter(tmp_path / name, tiny_base_dir(), Recipe(seed=n)) for n, name in enumerate("ab"))
    imported, uploaded, moved = (new_id() for _ in range(3))
    first = await client.import_dir("a", one, request_id=imported)
    await client.upload_recipe("b", Recipe(seed=2), request_id=uploaded)
    await set_alias(client, "a", "prod", first.revision.revision, request_id=moved)
    used = "was used, with another content, to"

    with refused(AlreadyExistsError, f"{used} import 'a'"):
        await client.import_dir("a", other, request_id=imported)
    with refused(AlreadyExistsError, f"{used} import 'a'"):
        await client.import_dir("a", one, label="prod", request_id=imported)
    with refused(AlreadyExistsError, "was used to import 'a'"):
        await client.import_dir("b", one, request_id=imported)
    with refused(AlreadyExistsError, f"{used} import 'b'"):
        await client.upload_recipe("b", Recipe(seed=3), request_id=uploaded)
    with refused(AlreadyExistsError, f"{used} import 'b'"):
        await client.import_dir("b", other, request_id=uploaded)
    with refused(AlreadyExistsError, f"{used} alias 'a'"):
        await set_alias(client, "a", "canary", first.revision.revision, request_id=moved)

    assert (await client.import_dir("a", one, request_id=imported)).revision.revision == first.revision.revision
    assert (await client.get("a")).adapter.etag == "v2"


async def test_of_two_calls_at_once_with_one_request_id_one_is_refused(client: StoreClient) -> None:
    shared = new_id()

    answers = await asyncio.gather(
        *(client.upload_recipe("a", Recipe(seed=n % 2), request_id=shared) for n in range(4)), return_exceptions=True
    )

    refusals = [answer for answer in answers if isinstance(answer, AlreadyExistsError)]
    assert len(refusals) == 2
    served = {answer.revision.revision for answer in answers if not isinstance(answer, BaseException)}
    assert served == {(await client.get("a")).revision.revision}


async def test_many_imports_at_once_all_count(client: StoreClient, tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / str(n), tiny_base_dir(), Recipe(seed=n)) for n in range(4)]

    results = await asyncio.gather(*(client.import_dir("a", folders[n % 4], label=f"l{n}") for n in range(12)))

    adapter = (await client.get("a")).adapter
    assert {a.label for a in adapter.aliases} == {"latest", *(f"l{n}" for n in range(12))}
    assert {a.label: a.revision for a in adapter.aliases if a.label != "latest"} == {
        f"l{n}": result.revision.revision for n, result in enumerate(results)
    }


async def test_operations_are_listed_and_deleted(client: StoreClient, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", tiny_base_dir())
    await client.import_dir("a", folder)
    listed = (await client.operations.ListOperations(operations_pb2.ListOperationsRequest())).operations
    metadata = pb.ImportAdapterMetadata()
    assert listed[0].metadata.Unpack(metadata)
    assert (metadata.name, metadata.stage) == ("a", pb.ImportAdapterMetadata.STAGE_DONE)
    assert metadata.bytes_done == metadata.bytes_total > 0

    await client.operations.DeleteOperation(operations_pb2.DeleteOperationRequest(name=listed[0].name))

    with refused(LoraplexError, "does not exist"), translated():
        await client.operations.GetOperation(operations_pb2.GetOperationRequest(name=listed[0].name))


async def test_a_filter_by_time_lists_the_newest_operations_first(client: StoreClient, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        await client.import_dir(name, write_adapter(tmp_path / name, tiny_base_dir()))

    async def listed(wanted: str, page_size: int = 0) -> list[pb.ImportAdapterMetadata]:
        request = operations_pb2.ListOperationsRequest(filter=wanted, page_size=page_size)
        operations = (await client.operations.ListOperations(request)).operations
        found = [pb.ImportAdapterMetadata() for _ in operations]
        assert all(each.metadata.Unpack(into) for each, into in zip(operations, found, strict=True))
        return found

    everything = await listed('create_time >= "2026-01-01T00:00:00Z"')
    assert [each.name for each in everything] == ["c", "b", "a"]
    assert [each.name for each in await listed('create_time >= "2026-01-01T00:00:00Z"', page_size=2)] == ["c", "b"]
    assert await listed('create_time >= "2999-01-01T00:00:00Z"') == []
    for other in ("done = false", 'create_time >= "yesterday at about noon"', 'create_time >= "2026-99-01T00:00:00Z"'):
        with refused(InvalidParameterError, "no filter that is served"), translated():
            await listed(other)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"name": "projects/p"}, "no operations of its own"),
        ({"filter": 'create_time >= "2026-01-01T00:00:00Z"', "page_token": "YQ=="}, "one page"),
        ({"page_token": "?"}, "not a page_token"),
        ({"page_token": "/w=="}, "not a page_token"),
        ({"page_size": -1}, "negative"),
    ],
)
async def test_what_a_list_of_operations_cannot_serve_is_refused(
    client: StoreClient, asked: dict[str, Any], why: str
) -> None:
    with refused(InvalidParameterError, why), translated():
        await client.operations.ListOperations(operations_pb2.ListOperationsRequest(**asked))


async def test_watchers_of_two_replicas_see_every_change(client: StoreClient, redis_url: str) -> None:
    await client.upload_recipe("a")
    async with running_rig(store_config(redis_url)) as (_, other):
        for replica in (client, other):
            watch = replica.stub.WatchAliases(pb.WatchAliasesRequest())
            first = await asyncio.wait_for(watch.read(), 10)
            assert first.snapshot_start
            assert first.snapshot_end
            assert "a" in [entry.name for entry in first.entries]
            sequence = first.sequence

            digest = (await client.upload_recipe("b", Recipe(seed=1), label="prod")).revision.revision
            change = await asyncio.wait_for(watch.read(), 10)
            assert change.sequence == sequence + 1
            assert [(a.label, a.revision) for a in change.entries[0].aliases] == [("latest", digest), ("prod", digest)]
            assert [r.revision for r in change.entries[0].revisions] == [digest]

            await delete(other, "b")
            change = await asyncio.wait_for(watch.read(), 10)
            assert change.entries[0].deleted
            assert list(change.entries[0].aliases) == []
            watch.cancel()

            resumed = replica.stub.WatchAliases(pb.WatchAliasesRequest(start_sequence=sequence))
            missed = await asyncio.wait_for(resumed.read(), 10)
            assert [entry.name for entry in missed.entries] == ["b"]
            resumed.cancel()


async def test_a_watch_from_an_unknown_position_is_refused(client: StoreClient) -> None:
    with refused(SequenceGapError, "start again"), translated():
        await client.stub.WatchAliases(pb.WatchAliasesRequest(start_sequence=10_000)).read()


async def test_a_download_is_a_safetensors_file_and_resumes(client: StoreClient) -> None:
    digest = (await client.upload_recipe("a", Recipe(rank=48))).revision.revision

    async def download(**fields: int) -> tuple[bytes, str]:
        data = b""
        async for part in client.stub.DownloadAdapter(pb.DownloadAdapterRequest(revision=digest, **fields)):
            assert part.crc32c == crc32c.crc32c(part.data)
            assert part.offset == len(data) + fields.get("offset", 0)
            data += part.data
        return data, part.sha256

    whole, sha256 = await download()
    assert sha256 == digest
    assert len(load(whole)) == 2 * 14
    assert (await download(offset=1000))[0] == whole[1000:]
    assert (await download(offset=1000, limit=77))[0] == whole[1000:1077]
    with refused(InvalidParameterError, "behind the end"), translated():
        await download(offset=len(whole) + 1)


async def test_the_store_can_do_without_an_append_only_file(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        valkey = connect(server.url)
        await valkey.config_set("appendonly", "no")
        async with running_rig(store_config(server.url)) as (_, client):
            await client.upload_recipe("a")
            assert await client.names() == ["a"]
        await valkey.aclose()


async def test_keys_decide_who_may_what(redis_url: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("root ops admin\nalice team-a\nbob team-b\n")
    config = store_config(redis_url, api_keys_file=keys)
    async with running_rig(config, api_key="root") as (store, admin):
        created = adapter_pb2.Adapter(name="private", allowed_tenants=["team-a"])
        await admin.stub.CreateAdapter(pb.CreateAdapterRequest(adapter=created))
        digest = (await admin.upload_recipe("private")).revision.revision
        target = f"127.0.0.1:{store.grpc_port}"
        async with open_channel(target, api_key="alice") as a, open_channel(target, api_key="bob") as b:
            alice, bob = StoreClient(channel=a), StoreClient(channel=b)
            assert (await alice.get("private")).revision.revision == digest
            with refused(AdapterNotFoundError, "private does not exist"):
                await bob.get("private")
            assert await bob.names() == []
            with refused(RoleForbiddenError, "it takes the role admin"):
                await alice.upload_recipe("mine")
            with refused(RoleForbiddenError, "it takes the role admin"):
                await delete(alice, "private")
        async with open_channel(target) as anybody:
            with refused(UnauthenticatedError, "API key"):
                await StoreClient(channel=anybody).names()
