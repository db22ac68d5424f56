"""The life of a name, over gRPC against a real Valkey: import, aliases, listing, deletion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
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
)
from loraplex_common.valkey import connect
from support.adapters import Recipe, write_adapter
from support.store_engine_peer import attached_peer
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
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


pytestmark = pytest.mark.integration


@pytest.fixture
async def client(redis_url: str, tmp_path: Path) -> AsyncIterator[StoreClient]:
    async with running_rig(store_config(redis_url, import_root=(tmp_path,))) as (_, client):
        yield client


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


async def test_an_import_is_stored_only_where_latest_is_what_is_expected(client: StoreClient, tmp_path: Path) -> None:
    first = (await client.upload_recipe("a", Recipe(seed=1), expected_revision="")).revision.revision

    for expected in ("", "0" * 64):
        with refused(ConflictError, "a:latest points at"):
            await client.upload_recipe("a", Recipe(seed=2), expected_revision=expected)
    with refused(ConflictError, "a:latest points at"):  # before anything is read: there is no such directory
        await client.import_dir("a", tmp_path / "nothing", expected_revision="")
    with refused(ConflictError, "b:latest points at nothing"):
        await client.upload_recipe("b", expected_revision=first)
    assert (await client.get("a")).revision.revision == first
    assert await client.names() == ["a"]

    second = await client.upload_recipe("a", Recipe(seed=2), expected_revision=first[:12])
    assert (await client.get("a")).revision.revision == second.revision.revision != first
    await delete(client, "a")
    assert (await client.upload_recipe("a", Recipe(seed=1), expected_revision="")).revision.revision == first


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


async def test_a_taken_name_is_not_created_again(client: StoreClient) -> None:
    request = pb.CreateAdapterRequest(adapter=adapter_pb2.Adapter(name="a"))
    await client.stub.CreateAdapter(request)
    with refused(AlreadyExistsError, "exists already"), translated():
        await client.stub.CreateAdapter(request)
    await delete(client, "a")
    await client.stub.CreateAdapter(request)
