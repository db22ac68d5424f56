"""Folders that are no adapter, over the wire: client, upload and directory import say the same of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from loraplex_client._store_messages import upload_header
from loraplex_common.errors import AdapterCorruptUploadError, LoraplexError
from support.adapters import adapter_files
from support.store_rig import StoreClient, refused, running_rig, store_config, tiny_base_dir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.integration


@pytest.fixture
async def client(valkey_url: str, tmp_path: Path) -> AsyncIterator[StoreClient]:
    (tmp_path / "root").mkdir()
    async with running_rig(store_config(valkey_url, import_root=(tmp_path / "root",))) as (_, client):
        yield client


@pytest.mark.parametrize(
    "names",
    [
        ("adapter_config.json", "adapter_model-00001-of-00002.safetensors"),
        ("adapters.safetensors", "adapter_config.json"),
        ("config.json", "model.safetensors"),
        ("adapter_config.json", "pytorch_model_fsdp_0/__0_0.distcp"),
        ("checkpoint-500/adapter_config.json", "checkpoint-500/adapter_model.safetensors"),
        ("adapter_config.json",),
    ],
    ids=lambda names: names[-1],
)
async def test_client_and_store_say_the_same_of_a_folder_that_is_no_adapter(
    client: StoreClient, tmp_path: Path, names: tuple[str, ...]
) -> None:
    folder = tmp_path / "root" / "a"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")

    with pytest.raises(LoraplexError) as here:
        upload_header("a", folder, label="", base_model="")
    with pytest.raises(LoraplexError) as there:
        await client.import_dir("a", folder)

    assert (type(here.value), here.value.message) == (type(there.value), there.value.message)


async def test_a_pointer_of_git_lfs_is_named_for_what_it_is(client: StoreClient) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 19539472\n"
    with refused(AdapterCorruptUploadError, r"adapter_model\.safetensors: only git-lfs's pointer .*git lfs pull"):
        await client.upload("a", adapter_files(tiny_base_dir()) | {"adapter_model.safetensors": pointer})
