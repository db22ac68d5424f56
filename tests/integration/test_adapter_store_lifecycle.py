"""The life of a name, over gRPC against a real Valkey: import, aliases, listing, deletion, watching."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import crc32c
import pytest
from google.longrunning import operations_pb2
from google.protobuf.field_mask_pb2 import FieldMask
from loraplex.v1 import adapter_pb2
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import (
    AdapterIncompatibleError,
    AdapterInUseError,
    AdapterNotFoundError,
    AlreadyExistsError,
    ConflictError,
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
from support.store_engine_peer import attached_peer
from support.store_rig import StoreClient, new_id, refused, running_rig, store_config, tiny_base_dir, translated
from support.valkey import fresh_database, running_server
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from loraplex_common.valkey import EmbeddedValkey

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    with running_server(tmp_path_factory.mktemp("valkey")) as running:
        yield running


@pytest.fixture
def redis_url(server: EmbeddedValkey) -> str:
    return fresh_database(server)


@pytest.fixture
async def client(redis_url: str, tmp_path: Path) -> AsyncIterator[StoreClient]:
    async with running_rig(store_config(redis_url, import_root=(tmp_path,))) as (_, client):
        yield client


async def set_alias(client: StoreClient, name: str, label: str, revision: str, **fields: Any) -> pb.SetAliasResponse:
    alias = adapter_pb2.Alias(name=name, label=label, revision=revision)
    with translated():
        response: pb.SetAliasResponse = await client.stub.SetAlias(pb.SetAliasRequest(alias=alias, **fields))
    return response


async def delete(client: StoreClient, name: str, **fields: Any) -> adapter_pb2.Adapter:
    with translated():
        response = await client.stub.DeleteAdapter(pb.DeleteAdapterRequest(name=name, **fields))
    adapter: adapter_pb2.Adapter = response.adapter
    return adapter


async def test_an_import_from_a_directory_is_described_and_found(client: StoreClient, tmp_path: Path) -> None:
    recipe = Recipe(rank=4, rank_pattern={"v_proj": 9}, targets=("q_proj", "v_proj"), layers=(1,))
    folder = write_adapter(tmp_path / "a" / "b", tiny_base_dir(), recipe)
    (folder / "README.md").write_text("ignored")
    (folder / "training_args.bin").write_bytes(b"ignored")

    result = await client.import_dir("team/first", folder, label="prod")

    revision = result.revision
    assert (revision.max_rank, revision.num_layers, list(revision.target_modules)) == (9, 1, ["q_proj", "v_proj"])
    assert revision.num_parameters == 4 * (64 + 64) + 9 * (64 + 32)
    assert revision.source == "dir:a/b"
    assert revision.base_fingerprint == load_base_model(tiny_base_dir()).fingerprint
    for name in ("team/first", "team/first:latest", "team/first:prod", f"team/first@{revision.revision}"):
        found = await client.get(name)
        assert found.revision == revision
        assert found.adapter.state == adapter_pb2.Adapter.STATE_READY


async def test_an_upload_of_the_same_weights_is_the_same_revision(client: StoreClient, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", tiny_base_dir())
    first = await client.import_dir("a", folder)

    second = await client.upload_recipe("b")

    assert second.already_existed
    assert second.revision.revision == first.revision.revision
    assert await client.names() == ["a", "b"]


async def test_latest_moves_with_every_import_and_labels_stay(client: StoreClient) -> None:
    first = (await client.upload_recipe("a", Recipe(seed=1), label="stable")).revision.revision
    second = (await client.upload_recipe("a", Recipe(seed=2))).revision.revision

    assert (await client.get("a")).revision.revision == second
    assert (await client.get("a:stable")).revision.revision == first
    page = await client.stub.ListAdapterRevisions(pb.ListAdapterRevisionsRequest(name="a", page_size=1))
    assert [r.revision for r in page.revisions] == [second]
    rest = await client.stub.ListAdapterRevisions(
        pb.ListAdapterRevisionsRequest(name="a", page_size=1, page_token=page.next_page_token)
    )
    assert [r.revision for r in rest.revisions] == [first]
    assert rest.next_page_token == ""


async def test_an_alias_moves_only_from_where_it_is_expected(client: StoreClient) -> None:
    first = (await client.upload_recipe("a", Recipe(seed=1))).revision.revision
    second = (await client.upload_recipe("a", Recipe(seed=2))).revision.revision
    await set_alias(client, "a", "prod", first, expected_revision="")

    with refused(ConflictError, "points at"):
        await set_alias(client, "a", "prod", second, expected_revision=second)
    await set_alias(client, "a", "prod", second, expected_revision=first)

    assert (await client.get("a:prod")).revision.revision == second
    await set_alias(client, "a", "prod", "")
    with refused(AdapterNotFoundError, "no label 'prod'"):
        await client.get("a:prod")
    with refused(AdapterNotFoundError, "does not exist in this store"):
        await set_alias(client, "a", "prod", "ab" * 32)
    with refused(AdapterIncompatibleError, "latest"):
        await set_alias(client, "a", "latest", "")


async def test_names_are_listed_in_pages(client: StoreClient) -> None:
    for name in ("b", "a/x", "a/y", "c"):
        with translated():
            await client.stub.CreateAdapter(pb.CreateAdapterRequest(adapter=adapter_pb2.Adapter(name=name)))
    page = await client.stub.ListAdapters(pb.AdapterStoreServiceListAdaptersRequest(page_size=3))
    rest = await client.stub.ListAdapters(
        pb.AdapterStoreServiceListAdaptersRequest(page_size=3, page_token=page.next_page_token)
    )

    assert [a.name for a in page.adapters] == ["a/x", "a/y", "b"]
    assert [a.name for a in rest.adapters] == ["c"]
    assert await client.names(name_prefix="a/") == ["a/x", "a/y"]
    assert page.adapters[0].state == adapter_pb2.Adapter.STATE_EMPTY
    with refused(InvalidParameterError, "negative"):
        await client.names(page_size=-1)
    with refused(InvalidParameterError, "page_token"):
        await client.names(page_token="no token!")


async def test_an_update_needs_the_present_etag(client: StoreClient) -> None:
    etag = (await client.upload_recipe("a")).adapter.etag
    change = adapter_pb2.Adapter(name="a", description="what it does", etag=etag)
    mask = FieldMask(paths=["description"])

    with translated():
        updated = await client.stub.UpdateAdapter(pb.UpdateAdapterRequest(adapter=change, update_mask=mask))

    assert updated.adapter.description == "what it does"
    with refused(ConflictError, "etag"), translated():
        await client.stub.UpdateAdapter(pb.UpdateAdapterRequest(adapter=change, update_mask=mask))
    with refused(InvalidParameterError, "update_mask"), translated():
        await client.stub.UpdateAdapter(pb.UpdateAdapterRequest(adapter=change, update_mask=FieldMask(paths=["name"])))


async def test_deleting_frees_the_memory_and_the_adapter_can_come_back(client: StoreClient, redis_url: str) -> None:
    digest = (await client.upload_recipe("a")).revision.revision
    valkey = connect(redis_url)
    assert await valkey.exists(f"a:{{{digest}}}:m")

    deleted = await delete(client, "a")

    assert deleted.state == adapter_pb2.Adapter.STATE_DELETED
    with refused(AdapterNotFoundError, "a does not exist"):
        await client.get("a")
    assert await client.names() == []
    assert await client.names(show_deleted=True) == ["a"]

    async def is_gone() -> bool:
        return [key async for key in valkey.scan_iter(f"*{digest}*")] == []

    await eventually(is_gone, what="nothing is left of the revision")
    again = await client.upload_recipe("a")
    assert not again.already_existed
    assert again.revision.revision == digest
    await valkey.aclose()


async def test_a_revision_that_another_name_has_survives_a_deletion(client: StoreClient, redis_url: str) -> None:
    digest = (await client.upload_recipe("a")).revision.revision
    await client.upload_recipe("b")
    other = (await client.upload_recipe("c", Recipe(seed=5))).revision.revision
    valkey = connect(redis_url)
    await delete(client, "a")
    await delete(client, "c")

    async def is_collected() -> bool:
        return not await valkey.exists(f"a:{{{other}}}:m")

    await eventually(is_collected, what="the other one is collected")
    assert (await client.get("b")).revision.revision == digest
    assert await valkey.exists(f"a:{{{digest}}}:m")
    await valkey.aclose()


async def test_an_adapter_that_requests_lease_is_deleted_only_by_force(client: StoreClient, redis_url: str) -> None:
    digest = (await client.upload_recipe("a")).revision.revision
    base = load_base_model(tiny_base_dir())
    async with (
        running_rig(store_config(redis_url)) as (_, other),  # the engine is attached to another replica
        attached_peer(other.channel, base) as peer,
    ):
        peer.want(digest)
        await peer.image(digest)
        peer.report(digest, adapter_pb2.TIER_DEVICE, num_leases=2)
        await peer.received("ack", count=2)
        with refused(AdapterInUseError, "2 running requests"):
            await delete(other, "a")

        valkey = connect(redis_url)

        async def is_published() -> bool:
            return await valkey.hget(f"loraplex:store:held:{peer.engine_id}", digest) == b"2"

        await eventually(is_published)
        with refused(AdapterInUseError, "2 running requests"):
            await delete(client, "a")

        await delete(client, "a", force=True)

        assert (await peer.received("drop")).digest == digest
        assert await valkey.exists(f"a:{{{digest}}}:m"), "held by an engine: kept"
        peer.report(digest, adapter_pb2.TIER_STORE)

        async def is_gone() -> bool:
            return not await valkey.exists(f"a:{{{digest}}}:m")

        await eventually(is_gone)
        await valkey.aclose()


async def test_an_adapter_that_changes_nothing_is_imported_with_a_warning_each_time(
    client: StoreClient, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a", tiny_base_dir(), Recipe(strength=0))
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    id_ = new_id()

    answers: list[Any] = [
        await client.import_dir("a", folder),
        await client.upload("a", files, request_id=id_),
        await client.upload("a", files, request_id=id_),
    ]

    told = [
        [warning for warning in answer.warnings if "answers as the base model does" in warning] for answer in answers
    ]
    other = await client.upload_recipe("b")
    assert [len(warnings) for warnings in told] == [1, 1, 1]
    assert not [warning for warning in other.warnings if "answers as the base model does" in warning]


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


async def test_a_taken_name_is_not_created_again(client: StoreClient) -> None:
    request = pb.CreateAdapterRequest(adapter=adapter_pb2.Adapter(name="a"))
    await client.stub.CreateAdapter(request)
    with refused(AlreadyExistsError, "exists already"), translated():
        await client.stub.CreateAdapter(request)
    await delete(client, "a")
    await client.stub.CreateAdapter(request)
