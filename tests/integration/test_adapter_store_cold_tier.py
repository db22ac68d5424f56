"""Object storage behind Valkey: it has every adapter, Valkey has copies under a budget; nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import redis
from loraplex_adapter_store.credentials import Credentials
from loraplex_adapter_store.object_storage import Bucket
from loraplex_adapter_store.repository import keys as valkey_keys
from loraplex_adapter_store.repository import object_tier
from loraplex_adapter_store.repository.blob_tier import ChunkPlace
from loraplex_adapter_store.repository.hot_tier import ColdTierError
from loraplex_adapter_store.service import running_store
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import StoreUnavailableError
from loraplex_common.grpc_channel import open_channel
from loraplex_common.tasks import cancel_and_wait
from support.adapters import Recipe
from support.fault_proxy import Said, Seen, Then, s3_error
from support.processes import ServiceProcess
from support.s3_server import KEYS, ObjectStorage, running_storage
from support.store_engine_peer import attached_peer
from support.store_rig import StoreClient, delete, refused, running_rig, store_config, tiny_base_dir
from support.valkey import running_server
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


pytestmark = pytest.mark.integration
BUDGET = 150_000


@pytest.fixture(autouse=True)
def _clients_try_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_tier, "RETRY_AFTER_S", 0.05)


@pytest.fixture(scope="module")
def served() -> Iterator[ObjectStorage]:
    with running_storage() as storage:
        yield storage


@pytest.fixture
def storage(served: ObjectStorage) -> ObjectStorage:
    served.proxy.forget()
    return served


@pytest.fixture
def credentials(tmp_path: Path) -> Path:
    path = tmp_path / "credentials"
    path.write_text(f"ours {KEYS[0]} {KEYS[1]}\n")
    return path


@pytest.fixture
def cold(storage: ObjectStorage, tmp_path: Path) -> str:
    """A folder of its own, as the flag takes it."""
    return storage.url_below(tmp_path.name, credential="ours")


@asynccontextmanager
async def store_with(redis_url: str, cold: str, credentials: Path, **config: Any) -> AsyncIterator[StoreClient]:
    config = {"cold_tier": Bucket.parse(cold), "credentials_file": credentials} | config
    async with running_rig(store_config(redis_url, **config)) as (_, client):
        yield client


async def image_of(client: StoreClient, revision: str) -> None:
    """Have an engine get the image of a revision."""
    async with attached_peer(client.channel, load_base_model(tiny_base_dir())) as peer:
        peer.want(revision)
        await peer.image(revision)


def chunks_in(redis_url: str) -> int:
    with redis.Redis.from_url(redis_url) as client:
        return len(client.keys("a:*:c:*"))


async def test_valkey_keeps_copies_under_its_budget_and_the_storage_has_every_adapter(
    redis_url: str, storage: ObjectStorage, cold: str, credentials: Path, tmp_path: Path
) -> None:
    async with store_with(redis_url, cold, credentials, hot_bytes=BUDGET) as client:
        revisions = [(await client.upload_recipe(f"a{seed}", Recipe(seed=seed))).revision for seed in range(4)]
        sizes = {revision.canonical_bytes for revision in revisions}
        assert BUDGET / 4 < max(sizes) < BUDGET, "some fit, not all"
        num_copies = chunks_in(redis_url)
        with redis.Redis.from_url(redis_url) as raw:
            held_bytes = int(raw.get(valkey_keys.HOT_BYTES) or 0)

        assert 0 < num_copies < len(revisions)
        assert held_bytes <= BUDGET
        digests = {path.rpartition("/")[2] for path in storage.names(tmp_path.name)}
        assert digests == {revision.revision for revision in revisions}

        for revision in revisions:  # from the copies, and from the storage
            await image_of(client, revision.revision)
        assert chunks_in(redis_url) == num_copies


async def test_what_was_read_from_the_storage_is_read_from_valkey_next(
    redis_url: str, storage: ObjectStorage, cold: str, credentials: Path
) -> None:
    async with store_with(redis_url, cold, credentials) as client:
        revision = (await client.upload_recipe("a")).revision.revision
        with redis.Redis.from_url(redis_url) as raw:
            raw.delete(valkey_keys.chunk(revision, 0))
        storage.proxy.forget()
        await image_of(client, revision)
        assert len(storage.proxy.seen) == 1
    async with store_with(redis_url, cold, credentials, image_cache_bytes=1) as client:  # another process, empty caches
        await image_of(client, revision)

    assert len(storage.proxy.seen) == 1


async def test_a_damaged_copy_comes_from_the_storage(
    redis_url: str, storage: ObjectStorage, cold: str, credentials: Path
) -> None:
    async with store_with(redis_url, cold, credentials) as client:
        revision = (await client.upload_recipe("a")).revision.revision
        with redis.Redis.from_url(redis_url) as raw:
            raw.setrange(valkey_keys.chunk(revision, 0), 5_000, b"\xff\x00\xff")
        await image_of(client, revision)
        assert (await client.get("a")).revision.revision == revision


async def test_a_collected_revision_is_gone_from_both(
    redis_url: str, storage: ObjectStorage, cold: str, credentials: Path, tmp_path: Path
) -> None:
    async with store_with(redis_url, cold, credentials) as client:
        await client.upload_recipe("a")
        assert storage.names(tmp_path.name)
        answers = iter([s3_error(503, "SlowDown")] * 2)
        storage.proxy.fault = lambda request: next(answers, None) if request.method == "DELETE" else None
        await delete(client, "a")
        await eventually(lambda: not storage.names(tmp_path.name))
        await eventually(lambda: chunks_in(redis_url) == 0)
        with redis.Redis.from_url(redis_url) as raw:
            await eventually(lambda: int(raw.get(valkey_keys.HOT_BYTES) or 0) == 0)


async def test_an_import_is_acknowledged_only_once_the_storage_has_it(
    redis_url: str, storage: ObjectStorage, cold: str, credentials: Path
) -> None:
    storage.proxy.fault = lambda request: s3_error(403, "AccessDenied") if request.method == "PUT" else None
    async with store_with(redis_url, cold, credentials) as client:
        with refused(StoreUnavailableError, "object storage cannot write revision .* AccessDenied"):
            await client.upload_recipe("a")
        assert await client.names() == []
        storage.proxy.forget()
        assert (await client.upload_recipe("a")).revision.revision


async def test_a_bucket_that_is_gone_is_no_reason_to_forget_an_adapter(
    redis_url: str, storage: ObjectStorage, cold: str, credentials: Path
) -> None:
    async with store_with(redis_url, cold, credentials, hot_bytes=1) as client:
        revision = (await client.upload_recipe("a")).revision.revision
        storage.proxy.fault = lambda _: s3_error(404, "NoSuchBucket")
        with refused(StoreUnavailableError, "cannot look for revision .* NoSuchBucket"):
            await client.upload_recipe("b")
        storage.proxy.forget()
        await image_of(client, revision)


async def test_a_renewed_credential_counts_from_the_next_call_on(
    redis_url: str, storage: ObjectStorage, cold: str, credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_common.watched_files.LOOK_EVERY_S", 0.0)

    def expired(request: Seen) -> Said | None:
        signed = next((value for name, value in request.headers.items() if name.lower() == "authorization"), "")
        is_refused = request.method == "PUT" and "Credential=renewed/" not in signed
        return s3_error(400, "ExpiredToken") if is_refused else None

    storage.proxy.fault = expired
    async with store_with(redis_url, cold, credentials) as client:
        with refused(StoreUnavailableError, "answers with ExpiredToken"):
            await client.upload_recipe("a")
        await asyncio.to_thread(credentials.write_text, "ours renewed secret\n")
        assert (await client.upload_recipe("a")).revision.revision


async def test_a_large_blob_is_written_in_parts_and_read_in_ranges(
    cold: str, storage: ObjectStorage, credentials: Path
) -> None:
    tier = object_tier.ObjectTier(Bucket.parse(cold), Credentials.from_file(credentials))
    chunks = [bytes([number]) * 2**21 for number in range(5)]
    await tier.write("ab" * 32, [[memoryview(chunk)] for chunk in chunks])

    assert sum(request.method == "PUT" for request in storage.proxy.seen) == 2
    for number, chunk in enumerate(chunks):
        assert await tier.read("ab" * 32, ChunkPlace(number, number * 2**21, (number + 1) * 2**21)) == chunk
    assert await tier.holds("ab" * 32, 5)
    assert not await tier.holds("cd" * 32, 5)
    assert await tier.read("cd" * 32, ChunkPlace(0, 0, 10)) is None


async def test_a_store_that_would_look_elsewhere_does_not_start(
    redis_url: str, cold: str, credentials: Path, storage: ObjectStorage
) -> None:
    async with store_with(redis_url, cold, credentials) as client:
        await client.upload_recipe("a")
    for config in (
        {},
        {"cold_tier": Bucket.parse(storage.url_below("other", credential="ours")), "credentials_file": credentials},
    ):
        with pytest.raises(ColdTierError, match="the adapters of this Valkey lie in s3://"):
            async with running_store(store_config(redis_url, **config)):
                pass
    with pytest.raises(ColdTierError, match="--cold-tier: the store knows no credential 'ours'"):
        async with running_store(store_config(redis_url, cold_tier=Bucket.parse(cold))):
            pass


@pytest.mark.parametrize("is_stored", [False, True])
async def test_a_store_killed_between_the_tiers_loses_nothing_that_it_acknowledged(
    storage: ObjectStorage, cold: str, credentials: Path, tmp_path: Path, is_stored: bool
) -> None:
    flags = ["--model", str(tiny_base_dir()), "--port", "0", "--metrics-port", "0"]
    flags += [
        "--cold-tier",
        cold,
        "--credentials-file",
        str(credentials),
        "--gc-grace-s",
        "0",
        "--gc-interval-s",
        "0.05",
    ]
    with running_server(tmp_path / "valkey") as server:
        flags += ["--redis-url", server.url]
        store = ServiceProcess("loraplex_adapter_store", flags, log_dir=tmp_path).wait_ready()
        async with upload_client(store) as client:
            first = (await client.upload_recipe("a", Recipe(seed=1))).revision.revision
            storage.proxy.fault = lambda request: _killing(store, request, is_stored=is_stored)
            importing = asyncio.create_task(client.upload_recipe("b", Recipe(seed=2)))
            await eventually(lambda: not store.is_running)
            await cancel_and_wait(importing)
        storage.proxy.forget()
        assert len(storage.names(tmp_path.name)) == 1 + is_stored

        store = ServiceProcess("loraplex_adapter_store", flags, log_dir=tmp_path).wait_ready()
        try:
            async with upload_client(store) as client:
                assert await client.names() == ["a"]
                await image_of(client, first)
                second = (await client.upload_recipe("b", Recipe(seed=2))).revision.revision
                await image_of(client, second)
        finally:
            store.stop()


def _killing(store: ServiceProcess, request: Seen, *, is_stored: bool) -> Said | Then | None:
    """Kill the store at its write to the storage: before the object is there, or after."""
    if request.method != "PUT":
        return None
    if is_stored:
        return Then(store.kill)
    store.kill()
    return Said(503)


@asynccontextmanager
async def upload_client(store: ServiceProcess) -> AsyncIterator[StoreClient]:
    async with open_channel(store.grpc) as channel:
        yield StoreClient(channel=channel)
