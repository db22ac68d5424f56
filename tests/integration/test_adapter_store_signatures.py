"""Signed adapters from every source of imports, through a whole store."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_adapter_store.imports.registry import Registry
from loraplex_adapter_store.object_storage import Bucket
from loraplex_client._store_messages import upload_header
from loraplex_common.errors import AdapterUntrustedError
from structlog.testing import capture_logs
from support.adapters import Recipe, adapter_files
from support.hub_double import HubDouble, running_hub
from support.model_signatures import key, signed, trust_text
from support.oci_registry import running_registry
from support.pushes import push_messages
from support.s3_server import BUCKET, KEYS, running_storage
from support.store_rig import StoreClient, refused, running_rig, store_config, tiny_base_dir, translated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.integration
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REQUIRE = {"default": "require"}


@pytest.fixture(scope="module")
def unsigned() -> dict[str, bytes]:
    return adapter_files(tiny_base_dir())


@pytest.fixture(scope="module")
def good(unsigned: dict[str, bytes]) -> dict[str, bytes]:
    return signed(unsigned, key("release"))


@asynccontextmanager
async def store_that(
    redis_url: str, tmp_path: Path, modes: dict[str, str] = REQUIRE, **config: Any
) -> AsyncIterator[StoreClient]:
    """Run a store that asks something of signatures, and trusts one key."""
    path = tmp_path / "trusted.toml"
    path.write_text(trust_text(modes, release=key("release")))
    root = tmp_path / "root"
    root.mkdir(exist_ok=True)
    async with running_rig(store_config(redis_url, trusted_signers=path, import_root=(root,), **config)) as (_, client):
        yield client


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


async def signer_of(client: StoreClient, name: str) -> str:
    with translated():
        answer = await client.stub.GetAdapterReport(pb.GetAdapterReportRequest(name=name))
    return str(answer.report.notes.signer)


async def test_a_signed_folder_is_imported_and_report_and_audit_say_by_which_key(
    redis_url: str, tmp_path: Path, unsigned: dict[str, bytes], good: dict[str, bytes]
) -> None:
    folder = write(tmp_path / "root" / "poet", good)
    with capture_logs() as captured:
        async with store_that(redis_url, tmp_path) as client:
            await client.import_dir("a", folder)
            (folder / "model.sig").unlink()
            with refused(AdapterUntrustedError, "dir:poet: not signed"):
                await client.import_dir("b", folder)

            assert await signer_of(client, "a") == "release"
            assert await client.names() == ["a"]
    lines = [line for line in captured if line["event"] == "audit"]
    assert [(line["outcome"], line.get("signer")) for line in lines] == [("OK", "release"), ("ADAPTER_UNTRUSTED", None)]


async def test_an_upload_of_the_clients_brings_the_signature(
    redis_url: str, tmp_path: Path, unsigned: dict[str, bytes], good: dict[str, bytes]
) -> None:
    folder = write(tmp_path / "mine", good)
    announced = [file.name for file in upload_header("a", folder, label="", base_model="").files]
    async with store_that(redis_url, tmp_path) as client:
        await client.upload("a", {name: good[name] for name in announced})
        with refused(AdapterUntrustedError, "upload: not signed"):
            await client.upload("b", unsigned)

        assert await signer_of(client, "a") == "release"


async def test_files_that_nothing_trusts_are_not_parsed(
    redis_url: str, tmp_path: Path, unsigned: dict[str, bytes]
) -> None:
    async with store_that(redis_url, tmp_path) as client:
        with refused(AdapterUntrustedError, "not signed"):
            await client.upload("a", unsigned | {"adapter_config.json": b"{ no json"})


async def test_a_push_is_refused_unless_the_operator_lets_pushes_be(redis_url: str, tmp_path: Path) -> None:
    messages = push_messages("a", 1)
    async with store_that(redis_url, tmp_path) as client:
        with refused(AdapterUntrustedError, 'push = "off" in --trusted-signers'), translated():
            await client.stub.PushAdapter(iter(messages))
    async with store_that(redis_url, tmp_path, REQUIRE | {"push": "off"}) as client:
        with translated():
            pushed = await client.stub.PushAdapter(iter(messages))

        assert pushed.revision.source == "push"


async def test_a_source_that_is_only_warned_about_is_imported_with_the_reason(
    redis_url: str, tmp_path: Path, unsigned: dict[str, bytes], good: dict[str, bytes]
) -> None:
    async with store_that(redis_url, tmp_path, {"default": "warn"}) as client:
        first = await client.upload("a", unsigned)
        assert await signer_of(client, "a") == ""
        again = await client.upload("a", good)

        assert any("not signed (model.sig)" in warning for warning in first.warnings)
        assert again.already_existed
        assert not any("signed" in warning for warning in again.warnings)
        assert await signer_of(client, "a") == "release", "the same weights, now signed"


async def test_a_store_that_asks_for_none_takes_any_signature_along(
    redis_url: str, tmp_path: Path, unsigned: dict[str, bytes]
) -> None:
    strange = unsigned | {"model.sig": b"anything"}
    folder = write(tmp_path / "root" / "poet", strange)
    async with running_rig(store_config(redis_url, import_root=(tmp_path / "root",))) as (_, client):
        await client.upload("a", strange)
        await client.import_dir("b", folder)

        assert await signer_of(client, "a") == ""


async def test_the_hub_a_bucket_and_a_registry_bring_the_signature(
    redis_url: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, good: dict[str, bytes]
) -> None:
    other = adapter_files(tiny_base_dir(), Recipe(seed=1))
    spoiled = other | {"model.sig": good["model.sig"]}
    (tmp_path / "credentials").write_text(f"ours {KEYS[0]} {KEYS[1]}\n")
    hub = HubDouble("org/adapter", COMMIT, good | {f"other/{name}": data for name, data in spoiled.items()})
    with (
        running_storage() as storage,
        running_registry(tmp_path_factory.mktemp("registry")) as registry,
        running_hub(hub),
    ):
        storage.put("good", good)
        storage.put("spoiled", spoiled)
        host = urlsplit(registry.url).netloc
        config: dict[str, Any] = {
            "import_bucket": (Bucket.parse(storage.url_below("", credential="ours")),),
            "import_registry": (Registry.parse(registry.url),),
            "credentials_file": tmp_path / "credentials",
            "hf_endpoint": hub.url,
        }
        async with store_that(redis_url, tmp_path, **config) as client:

            async def from_hub(name: str, subfolder: str) -> None:
                source = pb.HuggingFaceSource(repo="org/adapter", revision=COMMIT, subfolder=subfolder)
                with translated():
                    await client.wait(await client.stub.ImportAdapter(pb.ImportAdapterRequest(name=name, hf=source)))

            await client.import_uri("s3", f"s3://{BUCKET}/good")
            await client.import_uri("oci", f"oci://{host}/team/good@{registry.push('team/good', good)}")
            await from_hub("hf", "")

            assert [await signer_of(client, name) for name in ("s3", "oci", "hf")] == ["release"] * 3
            match = "is of release, but adapter_model.safetensors is not what was signed"
            with refused(AdapterUntrustedError, match):
                await client.import_uri("a", f"s3://{BUCKET}/spoiled")
            with refused(AdapterUntrustedError, match):
                await client.import_uri("a", f"oci://{host}/team/bad@{registry.push('team/bad', spoiled)}")
            with refused(AdapterUntrustedError, match):
                await from_hub("a", "other")
