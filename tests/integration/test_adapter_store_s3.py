"""Imports from object storage: moto's server behind a proxy that makes the faults of real ones."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_adapter_store import object_storage
from loraplex_adapter_store.imports.registry import Registry
from loraplex_adapter_store.object_storage import Bucket
from loraplex_common.errors import (
    AdapterCorruptUploadError,
    AdapterForbiddenError,
    AdapterNotFoundError,
    InvalidParameterError,
    StoreUnavailableError,
)
from support.adapters import Recipe, adapter_files
from support.fault_proxy import Cut, Said, Seen, s3_error
from support.s3_server import BUCKET, KEYS, ObjectStorage, running_storage
from support.store_rig import StoreClient, refused, running_rig, store_config, tiny_base_dir
from support.valkey import fresh_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from loraplex_common.valkey import EmbeddedValkey

pytestmark = pytest.mark.integration
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def served() -> Iterator[ObjectStorage]:
    with running_storage() as storage:
        storage.put("team/poet", adapter_files(tiny_base_dir()))
        storage.put("team/poet", {"README.md": b"#", "optimizer.pt": b"pickle"})
        storage.put("other/poet", adapter_files(tiny_base_dir(), Recipe(seed=1)))
        yield storage


@pytest.fixture
def storage(served: ObjectStorage) -> ObjectStorage:
    served.proxy.forget()
    return served


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "credentials"
    path.write_text(f"ours {KEYS[0]} {KEYS[1]}\nhub hf_token\n")
    return path


@asynccontextmanager
async def store_with(
    store_valkey: EmbeddedValkey, storage: ObjectStorage, keys: Path | None = None, **config: Any
) -> AsyncIterator[StoreClient]:
    config = {"import_bucket": (Bucket.parse(storage.url),), "credentials_file": keys} | config
    async with running_rig(store_config(fresh_database(store_valkey), **config)) as (_, client):
        yield client


async def import_poet(client: StoreClient, name: str = "a", **fields: Any) -> Any:
    fields = {"credential_ref": "ours"} | fields
    return await client.import_uri(name, f"s3://{BUCKET}/team/poet", **fields)


def weights_of(request: Seen) -> bool:
    return request.path.split("?")[0].endswith(WEIGHTS)


async def test_a_folder_of_a_bucket_is_imported_and_only_the_files_that_are_read_are_fetched(
    store_valkey: EmbeddedValkey, storage: ObjectStorage, keys: Path
) -> None:
    async with store_with(store_valkey, storage, keys) as client:
        result = await import_poet(client)
        uploaded = await client.upload("b", adapter_files(tiny_base_dir()))

        assert result.revision.source == f"s3://{BUCKET}/team/poet"
        assert result.revision.revision == uploaded.revision.revision
    fetched = {request.path.rpartition("/")[2] for request in storage.proxy.seen if "list-type" not in request.path}
    assert fetched == {"adapter_config.json", WEIGHTS}


async def test_what_is_wrong_with_a_bucket_source_is_said(
    store_valkey: EmbeddedValkey, storage: ObjectStorage, keys: Path
) -> None:
    allowed = (Bucket.parse(storage.url_below("team")), Bucket.parse(f"s3://nowhere?endpoint={storage.proxy.url}"))
    async with store_with(store_valkey, storage, keys, import_bucket=allowed) as client:
        for uri, error, match in (
            (f"s3://{BUCKET}/other/poet", InvalidParameterError, "in no bucket .*--import-bucket"),
            (f"s3://{BUCKET}/teamwork", InvalidParameterError, "in no bucket"),
            (f"s3://{BUCKET}/team/../other/poet", InvalidParameterError, "no folder of a bucket"),
            (f"s3://{BUCKET}/team/poet?endpoint=http://other", InvalidParameterError, "the operator names endpoint"),
            ("s3://A_B/x", InvalidParameterError, "no bucket's name"),
            (f"s3://{BUCKET}/team/nothing", AdapterNotFoundError, "nothing lies there"),
            ("s3://nowhere/x", AdapterNotFoundError, "no such bucket or object .NoSuchBucket"),
        ):
            with refused(error, match):
                await client.import_uri("a", uri, credential_ref="ours")
        with refused(InvalidParameterError, "no credential 'theirs'"):
            await import_poet(client, credential_ref="theirs")
        with refused(InvalidParameterError, "'hub' has 1 words; this source takes an access key, a secret key"):
            await import_poet(client, credential_ref="hub")
        with refused(AdapterForbiddenError, "refuses this credential"):
            await import_poet(client, credential_ref="")  # unsigned
        assert await client.names() == []


async def test_a_storage_that_asks_for_patience_gets_it(
    store_valkey: EmbeddedValkey, storage: ObjectStorage, keys: Path
) -> None:
    answers = iter([s3_error(503, "SlowDown")] * 3)
    storage.proxy.fault = lambda request: next(answers, None) if weights_of(request) else None

    async with store_with(store_valkey, storage, keys) as client:
        assert (await import_poet(client)).revision.revision

    assert sum(map(weights_of, storage.proxy.seen)) == 4


async def test_a_storage_that_stays_busy_is_unavailable_once_the_time_for_it_is_over(
    store_valkey: EmbeddedValkey, storage: ObjectStorage, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(object_storage.RETRIES, "max_retries", 2)
    storage.proxy.fault = lambda _: s3_error(503, "SlowDown")

    async with store_with(store_valkey, storage, keys) as client:
        with refused(StoreUnavailableError, "answers with SlowDown") as caught:
            await import_poet(client)
        assert caught.value.retry_after_s == 10.0


async def test_a_read_that_is_cut_goes_on_where_it_was(
    store_valkey: EmbeddedValkey, storage: ObjectStorage, keys: Path
) -> None:
    cuts = iter([Cut(1000), Cut(700)])
    storage.proxy.fault = lambda request: next(cuts, None) if weights_of(request) else None

    async with store_with(store_valkey, storage, keys) as client:
        uploaded = await client.upload("b", adapter_files(tiny_base_dir()))
        assert (await import_poet(client)).revision.revision == uploaded.revision.revision

    asked = [
        {name.lower(): value for name, value in seen.headers.items()} for seen in storage.proxy.seen if weights_of(seen)
    ]
    starts = [headers.get("range", "").removeprefix("bytes=").partition("-")[0] for headers in asked]
    assert starts == ["", "1000", "1700"]


async def test_an_object_that_changes_while_it_is_read_is_no_adapter(
    store_valkey: EmbeddedValkey, storage: ObjectStorage, keys: Path
) -> None:
    storage.put("team/moving", adapter_files(tiny_base_dir()))

    def fault(request: Seen) -> Cut | None:
        if not weights_of(request):
            return None
        if sum(map(weights_of, storage.proxy.seen)) == 1:
            return Cut(1000)
        storage.put("team/moving", adapter_files(tiny_base_dir(), Recipe(seed=9)))
        return None

    storage.proxy.fault = fault
    async with store_with(store_valkey, storage, keys) as client:
        with refused(AdapterCorruptUploadError, "it changed while it was read"):
            await client.import_uri("a", f"s3://{BUCKET}/team/moving", credential_ref="ours")
        assert await client.names() == []


async def test_an_expired_credential_is_read_again_from_its_file_once(
    store_valkey: EmbeddedValkey, storage: ObjectStorage, keys: Path
) -> None:
    def expired(request: Seen) -> Said | None:
        signed = request.headers.get("authorization", request.headers.get("Authorization", ""))
        return None if "Credential=renewed/" in signed else s3_error(400, "ExpiredToken")

    storage.proxy.fault = expired
    async with store_with(store_valkey, storage, keys) as client:
        with refused(
            AdapterForbiddenError, "has expired .ExpiredToken.; renew it in the credentials file .line 'ours'"
        ):
            await import_poet(client)
        await asyncio.to_thread(keys.write_text, "ours renewed secret session\n")
        assert (await import_poet(client)).revision.revision
        assert KEYS[1] not in str(await client.get("a"))


async def test_a_bucket_of_more_than_one_adapter_is_not_listed_to_its_end(
    store_valkey: EmbeddedValkey, storage: ObjectStorage, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_adapter_store.imports.s3.MAX_LISTED", 2)
    async with store_with(store_valkey, storage, keys) as client:
        with refused(AdapterCorruptUploadError, "more than 2 objects; import the folder of one adapter"):
            await client.import_uri("a", f"s3://{BUCKET}", credential_ref="ours")


@pytest.mark.parametrize(
    "text",
    ["adapters", "s3://", "s3://A", "s3://adapters/../x", "s3://adapters?endpoint=ftp://x", "s3://adapters?key=1"],
)
def test_a_bucket_that_is_none_is_refused_at_start(text: str) -> None:
    with pytest.raises(ValueError, match=r"s3|bucket"):
        Bucket.parse(text)


@pytest.mark.parametrize("text", ["https://", "ftp://host", "host/path", "user@host"])
def test_a_registry_that_is_none_is_refused_at_start(text: str) -> None:
    with pytest.raises(ValueError, match="is not of the form"):
        Registry.parse(text)
