"""What uploaders may get wrong, over the wire: a clear status with details, and no trace of what was refused."""

from __future__ import annotations

import hashlib
import json
import struct
import uuid
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import pytest
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc
from loraplex_common.errors import (
    AdapterCorruptUploadError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    InvalidParameterError,
    LoraplexError,
)
from loraplex_common.grpc_channel import open_channel
from loraplex_common.rpc_errors import error_from_rpc
from support.adapters import Recipe, adapter_files, write_adapter
from support.base_models import TinyBase, write_base_model
from support.generation import Neighbour, greedy
from support.strict_stack import MAX_ADAPTER_KIB, undisturbed_client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from loraplex_client import AsyncClient
    from support.stack import Stack

pytestmark = pytest.mark.integration

Store: TypeAlias = "adapter_store_pb2_grpc.AdapterStoreServiceAsyncStub"  # exists for type checkers only

REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)


@pytest.fixture
async def client(strict_stack: Stack, neighbour: Neighbour) -> AsyncIterator[AsyncClient]:
    async with undisturbed_client(strict_stack, neighbour) as client:
        yield client


@pytest.fixture
async def store(strict_stack: Stack) -> AsyncIterator[Store]:
    async with open_channel(strict_stack.store.grpc) as channel:
        yield adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)


async def upload(store: Store, name: str, files: dict[str, bytes], **header: Any) -> LoraplexError:
    """Upload files that are refused; return the refusal."""
    wire = adapter_store_pb2.UploadAdapterRequest
    listed = [
        wire.File(name=file, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for file, data in files.items()
    ]

    async def messages() -> AsyncIterator[adapter_store_pb2.UploadAdapterRequest]:
        yield wire(header=wire.Header(**({"name": name, "files": listed, "request_id": str(uuid.uuid4())} | header)))
        for data in files.values():
            for start_at in range(0, len(data), 2**20):
                yield wire(data=data[start_at : start_at + 2**20])

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await store.UploadAdapter(messages())
    return error_from_rpc(caught.value)


async def assert_invisible(client: AsyncClient, name: str) -> None:
    """Check that a refused adapter left no trace that a request could name."""
    with pytest.raises(AdapterNotFoundError):
        await client.adapters.get(name)
    with pytest.raises(AdapterNotFoundError):
        await greedy(client, name, 1)


def files_of(stack: Stack, recipe: Recipe | None = None) -> dict[str, bytes]:
    return adapter_files(stack.model, recipe)


def corrupt(kind: str, files: dict[str, bytes]) -> dict[str, bytes]:
    tensors = files["adapter_model.safetensors"]
    (header_bytes,) = struct.unpack("<Q", tensors[:8])
    header = json.loads(tensors[8 : 8 + header_bytes])
    if kind == "truncated":
        data = tensors[: len(tensors) // 2]
    elif kind == "empty":
        data = b""
    elif kind == "no header":
        data = b"\xff" * 4096
    elif kind == "huge header":
        data = struct.pack("<Q", 2**62) + tensors[8:]
    elif kind == "no JSON":
        data = tensors[:8] + b"{" * header_bytes + tensors[8 + header_bytes :]
    else:
        first = next(key for key in header if key != "__metadata__")
        if kind == "offsets outside":
            header[first]["data_offsets"] = [0, 2**40]
        elif kind == "wrong shape":
            header[first]["shape"] = [1, 1]
        elif kind == "not a number":
            start_at, stop = header[first]["data_offsets"]
            base = 8 + header_bytes
            data = tensors[: base + start_at] + b"\xff" * (stop - start_at) + tensors[base + stop :]
            return files | {"adapter_model.safetensors": data}
        encoded = json.dumps(header).encode()
        data = struct.pack("<Q", len(encoded)) + encoded + tensors[8 + header_bytes :]
    return files | {"adapter_model.safetensors": data}


@pytest.mark.parametrize(
    "kind",
    ["truncated", "empty", "no header", "huge header", "no JSON", "offsets outside", "wrong shape", "not a number"],
)
async def test_unsound_safetensors_are_refused_before_anything_is_visible(
    strict_stack: Stack, client: AsyncClient, store: Store, kind: str
) -> None:
    name = f"unsound-{kind.replace(' ', '-')}"

    error = await upload(store, name, corrupt(kind, files_of(strict_stack)))

    assert isinstance(error, AdapterCorruptUploadError | AdapterIncompatibleError)
    assert error.message
    await assert_invisible(client, name)


async def test_an_oversized_upload_is_refused(strict_stack: Stack, client: AsyncClient, store: Store) -> None:
    files = files_of(strict_stack)
    files["adapter_model.safetensors"] += b"\0" * (MAX_ADAPTER_KIB * 1024)

    error = await upload(store, "oversized", files)

    assert error.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert str(MAX_ADAPTER_KIB * 1024) in error.message
    await assert_invisible(client, "oversized")


async def test_pickles_are_refused_by_name(strict_stack: Stack, client: AsyncClient, store: Store) -> None:
    files = {"adapter_config.json": files_of(strict_stack)["adapter_config.json"], "adapter_model.bin": b"\x80\x02}q."}

    error = await upload(store, "pickled", files)

    assert error.code in REFUSALS
    assert "adapter_model.bin" in error.message
    await assert_invisible(client, "pickled")


@pytest.mark.parametrize("file", ["../adapter_config.json", "/etc/passwd", "a/../../b", "training_args.bin"])
async def test_other_files_and_paths_are_refused_by_name(
    strict_stack: Stack, client: AsyncClient, store: Store, file: str
) -> None:
    error = await upload(store, "escaping", files_of(strict_stack) | {file: b"x"})

    assert error.code in REFUSALS
    assert file in error.message
    await assert_invisible(client, "escaping")


@pytest.mark.parametrize("name", ["../up", "a/b/c", "", "a b", "x" * 300, "-x", "a@b"])
async def test_names_that_no_adapter_can_have_are_refused(
    strict_stack: Stack, client: AsyncClient, store: Store, name: str
) -> None:
    error = await upload(store, name, files_of(strict_stack))

    assert isinstance(error, InvalidParameterError)


@pytest.mark.parametrize("where", ["outside", "parent", "link"])
async def test_directory_imports_stay_below_their_root(
    strict_stack: Stack, client: AsyncClient, tmp_path: Path, where: str
) -> None:
    outside = write_adapter(tmp_path / "outside", strict_stack.model)
    link = strict_stack.import_root / "link-out"
    if where == "link":
        link.symlink_to(outside)
    source = {"outside": outside, "parent": strict_stack.import_root / ".." / "tiny", "link": link}[where]

    with pytest.raises(LoraplexError) as caught:
        await client.adapters.import_directory("escaped", source)

    link.unlink(missing_ok=True)
    assert caught.value.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED)
    await assert_invisible(client, "escaped")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"modules_to_save": ["norm"]}, "modules_to_save names 'norm'"),
        ({"bias": "some"}, "bias"),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(
    strict_stack: Stack, client: AsyncClient, store: Store, config: dict[str, Any], named: str
) -> None:
    error = await upload(store, "unserved", files_of(strict_stack, Recipe(config=config)))

    assert isinstance(error, AdapterIncompatibleError | AdapterCorruptUploadError)
    assert named in error.message
    await assert_invisible(client, "unserved")


async def test_an_adapter_for_another_base_is_refused(client: AsyncClient, store: Store, tmp_path: Path) -> None:
    other = write_base_model(tmp_path / "other", TinyBase(hidden_size=96, seed=9))

    error = await upload(store, "foreign", adapter_files(other))

    assert isinstance(error, AdapterIncompatibleError | AdapterCorruptUploadError)
    assert "lora_A" in error.message or "shape" in error.message
    await assert_invisible(client, "foreign")


async def test_an_adapter_that_names_an_unknown_base_is_refused(
    strict_stack: Stack, client: AsyncClient, store: Store
) -> None:
    files = files_of(strict_stack, Recipe(base_model_name_or_path="someone/else"))

    error = await upload(store, "stranger", files, base_model="nobody/knows")

    assert error.code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION)
    assert "nobody/knows" in error.message
    await assert_invisible(client, "stranger")


async def test_a_rank_too_large_for_the_pool_is_refused_with_the_arithmetic(
    strict_stack: Stack, client: AsyncClient
) -> None:
    directory = write_adapter(strict_stack.import_root / "broad", strict_stack.model, Recipe(rank=84))
    await client.adapters.import_directory("broad", directory)

    with pytest.raises(LoraplexError) as caught:
        await greedy(client, "broad")

    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "pages" in caught.value.message
