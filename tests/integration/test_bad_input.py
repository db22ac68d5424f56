"""What clients and uploaders may get wrong, over the wire: a clear status with details, and nobody else disturbed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
import uuid
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import pytest
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from loraplex_client import AsyncClient, Started
from loraplex_common.errors import (
    AdapterCorruptUploadError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    InvalidParameterError,
    LoraplexError,
    RequestRunningError,
    SaturatedError,
)
from loraplex_common.grpc_channel import open_channel
from loraplex_common.rpc_errors import error_from_rpc
from support.adapters import Recipe, adapter_files, write_adapter
from support.backend import kibibytes
from support.base_models import TinyBase, write_base_model
from support.engine_sessions import EngineSessionClient
from support.generation import PROMPT, Neighbour, greedy, start
from support.stack import Stack, StackFlags, assert_idle, read_load, running_stack
from support.stack_fixtures import import_all
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

pytestmark = pytest.mark.integration

Store: TypeAlias = "adapter_store_pb2_grpc.AdapterStoreServiceAsyncStub"  # exists for type checkers only
Gateway: TypeAlias = "gateway_pb2_grpc.GatewayServiceAsyncStub"


MAX_IN_GATEWAY = 48
MAX_ADAPTER_KIB = 3072  # the broadest adapter of a model with scaled widths takes 2.7 MB
REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)


@pytest.fixture(scope="module")
def strict_stack(tiny_world: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with small limits: a small pool, and small uploads."""
    flags = StackFlags(
        engine=(
            *("--pool-bytes", kibibytes(640), "--arena-bytes", kibibytes(2048)),
            *("--max-model-len", "400", "--outbox-max-age-s", "2"),
        ),
        store=("--max-adapter-bytes", f"{MAX_ADAPTER_KIB}KiB"),
        gateway=("--max-queued-requests", "24", "--max-concurrent-requests", "24", "--slow-client-s", "10"),
    )
    with running_stack(tmp_path_factory.mktemp("strict"), *tiny_world, flags) as stack:
        import_all(stack)
        yield stack


@pytest.fixture(scope="module")
def neighbour() -> Neighbour:
    return Neighbour("tiny-c")


@pytest.fixture
async def client(strict_stack: Stack, neighbour: Neighbour) -> AsyncIterator[AsyncClient]:
    client = strict_stack.client()
    async with neighbour.undisturbed(client):
        yield client
    await client.close()
    await assert_idle(strict_stack.engines[0])


@pytest.fixture
async def store(strict_stack: Stack) -> AsyncIterator[Store]:
    async with open_channel(strict_stack.store.grpc) as channel:
        yield adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)


@pytest.fixture
async def gateway(strict_stack: Stack) -> AsyncIterator[Gateway]:
    async with open_channel(strict_stack.gateway.grpc) as channel:
        yield gateway_pb2_grpc.GatewayServiceStub(channel)


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
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"bias": "all"}, "bias"),
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


@pytest.mark.parametrize("adapter", ["nobody", "tiny-a:nolabel", "tiny-a@" + "0" * 64])
async def test_an_unknown_adapter_is_not_found(client: AsyncClient, adapter: str) -> None:
    with pytest.raises(AdapterNotFoundError, match=adapter.partition(":")[0].partition("@")[0]):
        await greedy(client, adapter)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"prompt_token_ids": list(range(10)) * 40}, "prompt"),
        ({"prompt": ""}, "text"),
        ({"prompt_token_ids": [5, 100_000]}, "token_ids"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1e30}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": float("inf")}, "top_p"),
        ({"top_k": -5}, "top_k"),
        ({"min_p": 2.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 99.0}, "presence_penalty"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": 50, "max_new_tokens": 10}, "min_new_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logprobs": 1000}, "logprobs"),
        ({"adapter_scale": -1.0}, "adapter_scale"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
    ],
)
async def test_absurd_values_are_refused_by_the_name_of_their_field(
    client: AsyncClient, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        await greedy(client, "tiny-a", **options)

    assert caught.value.field is not None
    assert field in caught.value.field


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-30},
        {"temperature": 100.0, "top_p": 1e-9},
        {"temperature": 1.0, "min_p": 1.0, "top_k": 1},
        {"temperature": 1.0, "repetition_penalty": 1e-6},
        {"logit_bias": {5: -100.0}, "allowed_token_ids": [5]},
        {"adapter_scale": 100.0},
    ],
)
async def test_extreme_but_allowed_values_give_tokens(client: AsyncClient, options: dict[str, Any]) -> None:
    assert len(await greedy(client, "tiny-a", 8, seed=1, **options)) == 8


async def test_invalid_utf8_is_an_invalid_argument(client: AsyncClient, strict_stack: Stack) -> None:
    message = gateway_pb2.GenerateRequest(text="XX").SerializeToString().replace(b"XX", b"\xff\xfe")
    async with open_channel(strict_stack.gateway.grpc) as channel:
        generate: Any = channel.unary_stream("/loraplex.v1.GatewayService/Generate")
        call = generate(message)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_request_id_that_is_running_is_refused(client: AsyncClient) -> None:
    request_id = str(uuid.uuid4())
    first = start(client, "tiny-a", 300, request_id=request_id)
    assert isinstance(await anext(first), Started)

    with pytest.raises(RequestRunningError):
        await greedy(client, "tiny-a", request_id=request_id)

    await first.aclose()


async def test_a_client_that_stops_reading_delays_nobody(
    strict_stack: Stack, client: AsyncClient, gateway: Gateway
) -> None:
    request = gateway_pb2.GenerateRequest(
        token_ids=gateway_pb2.TokenIds(ids=PROMPT),
        adapter="tiny-a",
        sampling=gateway_pb2.SamplingParams(temperature=0.0),
        stopping=gateway_pb2.StoppingParams(max_new_tokens=390, ignore_eos=True),
        response_options=gateway_pb2.ResponseOptions(logprobs=20),
    )
    stuck = [gateway.Generate(request) for _ in range(4)]
    await asyncio.gather(*(call.read() for call in stuck))

    # Nobody reads on; the engine still finishes, or the gateway gives the request up.
    await assert_idle_but_for_neighbour(strict_stack)

    for call in stuck:
        call.cancel()


async def assert_idle_but_for_neighbour(stack: Stack) -> None:
    async def is_done() -> bool:
        load = await read_load(stack.engines[0])
        return load.running + load.waiting <= 1

    await eventually(is_done, timeout_s=30)


async def test_clients_that_vanish_leave_nothing_behind(strict_stack: Stack, client: AsyncClient) -> None:
    vanishing = strict_stack.client()
    streams = [start(vanishing, adapter, 390) for adapter in ("tiny-a", "tiny-b", None) * 4]
    await asyncio.gather(*(anext(stream) for stream in streams[:3]))

    await vanishing.close()

    await assert_idle_but_for_neighbour(strict_stack)


async def test_ten_thousand_requests_queued_on_an_engine_all_end(strict_stack: Stack, client: AsyncClient) -> None:
    expected = await greedy(client, None, 1)

    async with EngineSessionClient(strict_stack.engines[0].grpc) as session:
        outcomes = await session.submit_many(range(10_000), PROMPT, 1)
        tokens = [await session.finish(outcome, timeout_s=120) for outcome in outcomes]
        waiting = max(load.waiting for load in session.loads)

    assert waiting > 5000
    assert tokens == [expected] * 10_000


async def test_more_requests_than_a_gateway_queues_are_shed_with_a_retry_time(
    strict_stack: Stack, client: AsyncClient, gateway: Gateway
) -> None:
    request = gateway_pb2.GenerateOnceRequest(
        request=gateway_pb2.GenerateRequest(
            token_ids=gateway_pb2.TokenIds(ids=PROMPT),
            sampling=gateway_pb2.SamplingParams(temperature=0.0),
            stopping=gateway_pb2.StoppingParams(max_new_tokens=64, ignore_eos=True),
        )
    )
    expected = await greedy(client, None, 64)

    async def one() -> list[int] | LoraplexError:
        try:
            return list((await gateway.GenerateOnce(request, timeout=120)).token_ids)
        except grpc.aio.AioRpcError as error:
            return error_from_rpc(error)

    results = await asyncio.gather(*(one() for _ in range(400)))

    shed = [result for result in results if isinstance(result, LoraplexError)]
    served = [result for result in results if not isinstance(result, LoraplexError)]
    assert served == [expected] * len(served)
    assert len(served) >= MAX_IN_GATEWAY
    assert shed
    assert all(isinstance(error, SaturatedError) and error.retry_after_s is not None for error in shed)
