"""Imports from a hub on loopback, through the real client library."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.errors import (
    AdapterCorruptUploadError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    InvalidParameterError,
    StoreUnavailableError,
)
from support.adapters import adapter_files
from support.hub_double import HubDouble, running_hub
from support.store_rig import StoreClient, refused, running_rig, store_config, tiny_base_dir, translated
from support.valkey import fresh_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from loraplex_common.valkey import EmbeddedValkey

pytestmark = pytest.mark.integration
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@asynccontextmanager
async def store_with_hub(store_valkey: EmbeddedValkey, hub: HubDouble, **config: Any) -> AsyncIterator[StoreClient]:
    with running_hub(hub):
        async with running_rig(store_config(fresh_database(store_valkey), hf_endpoint=hub.url, **config)) as (
            _,
            client,
        ):
            yield client


async def import_from(client: StoreClient, **fields: Any) -> pb.ImportAdapterResult:
    source = pb.HuggingFaceSource(
        repo=fields.pop("repo", "org/adapter"),
        revision=fields.pop("revision", COMMIT),
        subfolder=fields.pop("subfolder", ""),
    )
    with translated():
        return await client.wait(
            await client.stub.ImportAdapter(pb.ImportAdapterRequest(name="a", hf=source, **fields))
        )


async def test_only_the_files_of_the_allow_list_are_fetched(store_valkey: EmbeddedValkey) -> None:
    extra = {"optimizer.pt": b"pickle", "code.py": b"import os", "README.md": b"#"}
    hub = HubDouble("org/adapter", COMMIT, adapter_files(tiny_base_dir()) | extra)
    async with store_with_hub(store_valkey, hub) as client:
        result = await import_from(client)

        assert result.revision.source == f"hf:org/adapter@{COMMIT}"
        fetched = {path.rsplit("/", 1)[1] for path in hub.requests if "/resolve/" in path}
        assert fetched == {"adapter_config.json", "adapter_model.safetensors"}


async def test_without_a_commit_the_one_of_the_default_branch_is_imported_and_written_down(
    store_valkey: EmbeddedValkey,
) -> None:
    hub = HubDouble("org/adapter", COMMIT, adapter_files(tiny_base_dir()))
    async with store_with_hub(store_valkey, hub) as client:
        result = await import_from(client, revision="")

        assert result.revision.source == f"hf:org/adapter@{COMMIT}"
        assert {path.split("/")[4] for path in hub.requests if "/resolve/" in path} == {COMMIT}


async def test_a_subfolder_is_imported_with_a_credential_by_name(store_valkey: EmbeddedValkey, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("# private\nours hf_secret\n")
    files = {f"checkpoints/last/{name}": data for name, data in adapter_files(tiny_base_dir()).items()}
    hub = HubDouble("org/adapter", COMMIT, files, token="hf_secret")
    async with store_with_hub(store_valkey, hub, credentials_file=tmp_path / "credentials") as client:
        with refused(AdapterNotFoundError, "no such repository"):
            await import_from(client, subfolder="checkpoints/last")
        with refused(InvalidParameterError, "no credential 'theirs'"):
            await import_from(client, subfolder="checkpoints/last", credential_ref="theirs")

        result = await import_from(client, subfolder="checkpoints/last", credential_ref="ours")

        assert result.revision.source == f"hf:org/adapter@{COMMIT}/checkpoints/last"


async def test_what_is_wrong_with_a_hub_source_is_said(store_valkey: EmbeddedValkey) -> None:
    files = adapter_files(tiny_base_dir())
    pickled = {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": b"\x80"}
    foreign = files | {"tokenizer.json": json.dumps({"model": {}}).encode()}
    hub = HubDouble("org/adapter", COMMIT, files)
    async with store_with_hub(store_valkey, hub) as client:
        for revision in ("main", "v1", COMMIT[:-1], COMMIT.upper()):
            with refused(InvalidParameterError, "no commit"):
                await import_from(client, revision=revision)
        with refused(InvalidParameterError, "org/name"):
            await import_from(client, repo="adapter")
        with refused(InvalidParameterError, "no folder"):
            await import_from(client, subfolder="../x")
        with refused(AdapterNotFoundError, "no such repository or commit"):
            await import_from(client, revision="f" * 40)
        with refused(AdapterNotFoundError, "no such repository or commit"):
            await import_from(client, repo="org/other")
        hub.files = pickled
        with refused(AdapterIncompatibleError, "adapter_model.bin"):
            await import_from(client)
        hub.files = foreign
        with refused(AdapterIncompatibleError, "tokenizer.json"):
            await import_from(client)
        hub.files = files | {"adapter_model.safetensors": b"\0" * (9 * 2**20)}
        with refused(AdapterCorruptUploadError, "at most"):
            await import_from(client)
        assert await client.names() == []


class OtherServer(HubDouble):
    """Answers 200 and what it is given, as a proxy's login page does."""

    def __init__(self, body: bytes) -> None:
        super().__init__("org/adapter", COMMIT, {})
        self.body = body

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, self.body


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b"null", b"{}", b'{"id": "a", "siblings": [{"rfilename": 5}]}', b"[" * 100_000]
)
async def test_an_answer_that_is_no_hubs_is_unavailable(store_valkey: EmbeddedValkey, body: bytes) -> None:
    async with store_with_hub(store_valkey, OtherServer(body)) as client:
        with refused(StoreUnavailableError, "not a hub's"):
            await import_from(client)


async def test_a_hub_that_cannot_be_reached_is_unavailable(store_valkey: EmbeddedValkey) -> None:
    config = store_config(fresh_database(store_valkey), hf_endpoint="http://127.0.0.1:1")
    async with running_rig(config) as (_, client):
        with refused(StoreUnavailableError, "cannot be downloaded"):
            await import_from(client)
