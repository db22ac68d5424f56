"""Folders that are no adapter, over the wire: client, upload and directory import say the same of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from loraplex_client._store_messages import upload_header
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import AdapterCorruptUploadError, InvalidParameterError, LoraplexError
from support.adapters import Recipe, adapter_config, adapter_files, adapter_tensors
from support.dialects import mlx
from support.safetensors_files import safetensors_bytes
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
        ("0000100_adapters.safetensors", "adapter_config.json"),
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


async def test_an_adapter_of_mlx_is_the_one_that_peft_would_have_written_by_every_way_in(
    client: StoreClient, tmp_path: Path
) -> None:
    """Uploaded, from a directory, and as the client announces it; the warnings say what was read."""
    base, recipe = load_base_model(tiny_base_dir()), Recipe(rank=4, alpha=8)
    fields, tensors = mlx(adapter_config(recipe), adapter_tensors(base, recipe), base)
    files = {
        "adapter_config.json": json.dumps(fields).encode(),
        "adapters.safetensors": safetensors_bytes(tensors, "float32"),
    }
    folder = tmp_path / "root" / "mlx"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)

    plain = await client.upload_recipe("peft", recipe)
    uploaded = await client.upload("uploaded", files)
    found = await client.import_dir("found", folder)

    assert uploaded.revision.revision == found.revision.revision == plain.revision.revision
    assert any(warning.startswith("read as MLX-LM writes it (28 tensors)") for warning in uploaded.warnings)
    header = upload_header("a", folder, label="", base_model="")
    assert [file.name for file in header.files] == list(files)
    with refused(AdapterCorruptUploadError, r"adapters\.safetensors: 3 bytes are no safetensors file"):
        await client.upload("broken", files | {"adapters.safetensors": b"abc"})
    with refused(InvalidParameterError, r"adapters\.safetensors: another file has the weights"):
        await client.upload("both", adapter_files(tiny_base_dir()) | files)


async def test_a_pointer_of_git_lfs_is_named_for_what_it_is(client: StoreClient) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 19539472\n"
    with refused(AdapterCorruptUploadError, r"adapter_model\.safetensors: only git-lfs's pointer .*git lfs pull"):
        await client.upload("a", adapter_files(tiny_base_dir()) | {"adapter_model.safetensors": pointer})
