"""Adapter management against a store that plays its part, blocking and asyncio alike."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING

import pytest
from loraplex_client import AdapterState, AsyncClient, Client, ImportProgress, ImportStage
from loraplex_common.errors import AdapterIncompatibleError, AdapterNotFoundError, InvalidParameterError
from support.adapter_reports import adapter_report
from support.gateway_double import DIGEST, StoreDouble, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def store() -> StoreDouble:
    return StoreDouble()


@pytest.fixture
def target(store: StoreDouble) -> Iterator[str]:
    with serving(store=store) as target:
        yield target


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client("127.0.0.1:1", store_target=target) as client:
        yield client


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 10_000)
    (tmp_path / "README.md").write_text("not sent")
    return tmp_path


def test_upload_sends_the_files_and_their_digests(client: Client, store: StoreDouble, directory: Path) -> None:
    seen: list[ImportProgress] = []

    result = client.adapters.upload("json", directory, label="prod", progress=seen.append)

    weights = (directory / "adapter_model.safetensors").read_bytes()
    assert store.uploads["json"] == {"adapter_config.json": b"{}", "adapter_model.safetensors": weights}
    header = store.requests[0]
    assert header.label == "prod"
    assert header.files[1].sha256 == hashlib.sha256(weights).hexdigest()
    assert result.revision.digest == DIGEST
    assert result.adapter.aliases == {"latest": DIGEST}
    assert seen[-1] == ImportProgress(
        stage=ImportStage.FETCHING, bytes_done=len(weights) + 2, bytes_total=len(weights) + 2
    )


def test_upload_announces_a_tokenizer_for_the_store_to_judge(
    client: Client, store: StoreDouble, directory: Path
) -> None:
    (directory / "added_tokens.json").write_text('{"<x>": 7}')

    client.adapters.upload("json", directory)

    assert "added_tokens.json" in store.uploads["json"]


def test_upload_of_a_pickle_is_refused_by_name(client: Client, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02")

    with pytest.raises(AdapterIncompatibleError, match=r"adapter_model\.bin: pickled"):
        client.adapters.upload("json", tmp_path)


def test_a_hub_import_waits_and_reports_progress(client: Client, store: StoreDouble) -> None:
    seen: list[ImportProgress] = []

    result = client.adapters.import_hub("json", "org/repo", revision="0" * 40, subfolder="a", progress=seen.append)

    request = store.requests[0]
    assert (request.hf.repo, request.hf.revision, request.hf.subfolder) == ("org/repo", "0" * 40, "a")
    assert result.adapter.state is AdapterState.READY
    assert [progress.bytes_done for progress in seen] == [0, 50, 100]
    assert [progress.stage for progress in seen][-1] is ImportStage.DONE


def test_a_failed_import_raises_what_the_store_found(client: Client, store: StoreDouble) -> None:
    store.import_error = AdapterIncompatibleError("q_proj of layer 3: expected [8, 64]")

    with pytest.raises(AdapterIncompatibleError, match="expected"):
        client.adapters.import_hub("json", "org/repo", revision="0" * 40)


def test_a_directory_import_names_it_by_uri(client: Client, store: StoreDouble, directory: Path) -> None:
    client.adapters.import_directory("json", directory, base_model="org/base")

    assert store.requests[0].uri == directory.as_uri()
    assert store.requests[0].base_model == "org/base"


def test_adapters_are_listed_over_pages(client: Client, directory: Path) -> None:
    for name in ("a1", "a2", "b"):
        client.adapters.upload(name, directory)

    assert [adapter.name for adapter in client.adapters.list()] == ["a1", "a2", "b"]
    assert [adapter.name for adapter in client.adapters.list(prefix="a")] == ["a1", "a2"]


def test_an_adapter_is_looked_up_named_and_deleted(client: Client, store: StoreDouble, directory: Path) -> None:
    client.adapters.upload("json", directory)

    assert client.adapters.get("json:latest").resolved is not None
    assert [revision.digest for revision in client.adapters.revisions("json")] == [DIGEST]
    assert client.adapters.alias("json", "prod", DIGEST, expected_revision="").aliases["prod"] == DIGEST
    assert store.requests[-1].HasField("expected_revision")
    assert client.adapters.delete("json", force=True).state is AdapterState.DELETED
    with pytest.raises(AdapterNotFoundError):
        client.adapters.get("json")


def test_hints_carry_the_digest_behind_the_name(client: Client, store: StoreDouble, directory: Path) -> None:
    client.adapters.upload("json", directory)

    client.adapters.prefetch("json", engine_id="e1", wanted_in_s=0.5)
    client.adapters.evict("json")

    prefetch, evict = store.requests[-2:]
    assert (prefetch.revision, prefetch.engine_id, prefetch.wanted_in.ToMilliseconds()) == (DIGEST, "e1", 500)
    assert (evict.revision, evict.engine_id) == (DIGEST, "")


async def test_the_asyncio_twin_does_the_same(target: str, store: StoreDouble, directory: Path) -> None:
    seen: list[ImportProgress] = []
    async with AsyncClient("127.0.0.1:1", store_target=target) as client:
        adapters = client.adapters

        uploaded = await adapters.upload("json", directory, progress=seen.append)
        imported = await adapters.import_hub("other", "org/repo", revision="0" * 40, progress=seen.append)
        await adapters.import_directory("third", directory)
        names = [adapter.name async for adapter in adapters.list()]
        revisions = [revision.digest async for revision in adapters.revisions("json")]
        aliased = await adapters.alias("json", "prod", DIGEST)
        await adapters.prefetch("json")
        await adapters.evict("json")
        deleted = await adapters.delete("json")

        assert uploaded.revision.digest == imported.revision.digest == DIGEST
        assert seen[-1].stage is ImportStage.DONE
        assert names == ["json", "other", "third"]
        assert revisions == [DIGEST]
        assert aliased.aliases["prod"] == DIGEST
        assert deleted.state is AdapterState.DELETED
        with pytest.raises(AdapterNotFoundError):
            await adapters.get("json")
        with pytest.raises(InvalidParameterError):
            await adapters.upload("json", directory / "nowhere")


async def test_both_clients_return_the_same_report(target: str, store: StoreDouble, client: Client) -> None:
    store.report = adapter_report()

    blocking = await asyncio.to_thread(client.adapters.report, "json")
    async with AsyncClient("127.0.0.1:1", store_target=target) as other:
        assert await other.adapters.report("json") == blocking

    assert (blocking.name, blocking.revision) == ("json", DIGEST)
    assert blocking.modules[0].parts[0].relative_norm == 0.25
    assert blocking.modules[1].base_norm is None
    assert blocking.notes is not None
    assert blocking.notes.num_omitted == 2
