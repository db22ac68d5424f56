"""Tensors that a trainer pushes: stored as their file would be, brought to engines, and only then what labels mean."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_client import AsyncClient
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import (
    AdapterCorruptUploadError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    CancelledRequestError,
    ConflictError,
    InvalidParameterError,
)
from loraplex_common.kept_status import answer_of
from loraplex_common.valkey import connect
from support.adapters import Recipe
from support.pushes import adapters_at, push_messages, tensors_of
from support.store_engine_peer import EnginePeer, attached_peer
from support.store_rig import (
    StoreClient,
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
    from collections.abc import AsyncIterator, Callable

    from loraplex_adapter_store.service import RunningStore
    from loraplex_client import AsyncAdapters

pytestmark = pytest.mark.integration


@pytest.fixture
async def rig(redis_url: str) -> AsyncIterator[tuple[RunningStore, StoreClient]]:
    async with running_rig(store_config(redis_url, keep_pushed_revisions=2)) as running:
        yield running


@pytest.fixture
def client(rig: tuple[RunningStore, StoreClient]) -> StoreClient:
    return rig[1]


@pytest.fixture
async def adapters(rig: tuple[RunningStore, StoreClient]) -> AsyncIterator[AsyncAdapters]:
    async with adapters_at(rig[0].grpc_port) as adapters:
        yield adapters


async def send(client: StoreClient, messages: list[pb.PushAdapterRequest]) -> pb.PushAdapterResponse:
    with translated():
        response: pb.PushAdapterResponse = await answer_of(client.stub.PushAdapter(iter(messages)))
    return response


def attached(client: StoreClient, **options: Any) -> Any:
    return attached_peer(client.channel, load_base_model(tiny_base_dir()), **options)


async def hold(peer: EnginePeer, digest: str) -> None:
    peer.want(digest)
    await peer.image(digest)


async def latest(client: StoreClient, name: str = "a") -> str:
    return (await client.get(name)).revision.revision


async def assert_no_blob(redis_url: str, *, but: int = 0) -> None:
    """Wait until no weights but those of some revisions are left."""
    valkey = connect(redis_url)

    async def is_collected() -> bool:
        return len(await valkey.keys("a:*:m")) == but

    await eventually(is_collected, what="blobs collected")
    await valkey.aclose()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
async def test_pushed_tensors_have_the_revision_of_their_file(
    client: StoreClient, adapters: AsyncAdapters, dtype: str
) -> None:
    uploaded = await client.upload_recipe("file", Recipe(seed=3, dtype=dtype))
    values, config = tensors_of(3)
    state_dict = {name: torch.from_numpy(value).to(getattr(torch, dtype)) for name, value in values.items()}

    pushed = await adapters.push("a", state_dict, config)

    assert pushed.revision.digest == uploaded.revision.revision
    assert pushed.already_existed
    if dtype != "bfloat16":  # of which numpy has no type
        arrays = {name: value.astype(dtype) for name, value in values.items()}
        assert (await adapters.push("b", arrays, config)).revision.digest == pushed.revision.digest


async def test_names_and_views_of_a_model_are_read_as_a_file_s(client: StoreClient, adapters: AsyncAdapters) -> None:
    uploaded = await client.upload_recipe("file", Recipe(seed=3))
    values, config = tensors_of(3)
    turned = {
        name.replace(".weight", ".default.weight"): torch.from_numpy(value.T.copy()).T for name, value in values.items()
    }

    pushed = await adapters.push("a", turned, config)

    assert pushed.revision.digest == uploaded.revision.revision
    assert "the adapter's name" in " ".join(pushed.warnings)


async def test_labels_move_once_every_engine_that_holds_the_old_revision_holds_the_new(
    client: StoreClient, adapters: AsyncAdapters
) -> None:
    old = (await adapters.push("a", *tensors_of(1), label="prod")).revision.digest
    async with attached(client) as peer, attached(client, engine_id="without") as without:
        await hold(peer, old)
        peer.auto_grant = False
        pushing = asyncio.create_task(adapters.push("a", *tensors_of(2), label="prod"))
        offer = await peer.received("offer", count=2)
        assert await latest(client) == await latest(client, "a:prod") == old
        assert [each.digest async for each in adapters.revisions("a")] == [old]

        peer.grant(offer.digest)
        pushed = await pushing

        assert offer.expected, "the engine is not to make room for it"
        assert offer.digest == pushed.revision.digest in peer.images
        assert (pushed.ready_engines, pushed.late_engines) == (("engine-test",), ())
        assert await latest(client) == await latest(client, "a:prod") == pushed.revision.digest
        assert "offer" not in without.kinds()


async def test_an_engine_that_has_no_room_is_named_when_the_time_is_over(
    client: StoreClient, adapters: AsyncAdapters
) -> None:
    old = (await adapters.push("a", *tensors_of(1))).revision.digest
    async with attached(client) as peer:
        await hold(peer, old)
        peer.accept_unsolicited = False

        pushed = await adapters.push("a", *tensors_of(2), ready_timeout_s=0.2)

        assert (pushed.ready_engines, pushed.late_engines) == ((), ("engine-test",))
        assert pushed.ready_timeout_s == 0.2
        assert await latest(client) == pushed.revision.digest


async def test_engines_of_other_replicas_are_waited_for(client: StoreClient, redis_url: str) -> None:
    async with running_rig(store_config(redis_url)) as (other, _), adapters_at(other.grpc_port) as adapters:
        old = (await adapters.push("a", *tensors_of(1))).revision.digest
        async with attached(client) as peer:
            await hold(peer, old)
            valkey = connect(redis_url)
            await eventually(lambda: valkey.hexists("loraplex:store:held:engine-test", old), what="holdings published")
            await valkey.aclose()

            pushed = await adapters.push("a", *tensors_of(2))

            assert pushed.revision.digest in peer.images
            assert pushed.ready_engines == ("engine-test",)


async def test_of_two_pushes_after_one_revision_one_is_stored(client: StoreClient, redis_url: str) -> None:
    first = (await send(client, push_messages("a", 1))).revision.revision

    answers = await asyncio.gather(
        *(send(client, push_messages("a", seed, expected=first)) for seed in (2, 3)), return_exceptions=True
    )

    (lost,) = (answer for answer in answers if isinstance(answer, ConflictError))
    (won,) = (answer for answer in answers if not isinstance(answer, BaseException))
    assert f"points at {won.revision.revision}, not at {first}" in lost.message
    listed = await client.stub.ListAdapterRevisions(pb.ListAdapterRevisionsRequest(name="a"))
    assert [each.revision for each in listed.revisions] == [won.revision.revision, first]
    await assert_no_blob(redis_url, but=2)


async def test_expected_is_about_the_label_that_is_named(client: StoreClient, adapters: AsyncAdapters) -> None:
    first = (await adapters.push("a", *tensors_of(1), label="prod")).revision.digest
    await adapters.push("a", *tensors_of(2))

    with pytest.raises(ConflictError, match=r"a:latest points at \w+, not at " + first):
        await adapters.push("a", *tensors_of(3), expected=first)
    with pytest.raises(ConflictError, match="a:canary points at nothing, not at"):
        await adapters.push("a", *tensors_of(3), label="canary", expected=first)
    third = await adapters.push("a", *tensors_of(3), label="prod", expected=first)
    assert await latest(client, "a:prod") == third.revision.digest


async def test_a_client_that_dies_in_the_middle_leaves_nothing(
    client: StoreClient, rig: tuple[RunningStore, StoreClient], redis_url: str
) -> None:
    messages = push_messages("a", 1)
    for count in range(1, len(messages)):
        call = client.stub.PushAdapter()
        for message in messages[:count]:
            await call.write(message)
        call.cancel()

    await eventually(lambda: rig[0].importer.budget.held_bytes == 0, what="the push's memory is given back")
    assert await client.names() == []
    await assert_no_blob(redis_url)


class Lost:
    """A tensor of some shape that cannot be read when its turn comes."""

    def __init__(self, tensor: Any, during: Callable[[], object] = lambda: None) -> None:
        self.dtype, self.shape, self._during = tensor.dtype, tensor.shape, during

    def __array__(self, *_: Any, **__: Any) -> Any:
        self._during()
        raise ZeroDivisionError("the device is lost")


async def test_a_push_whose_tensor_cannot_be_read_raises_why_and_leaves_nothing(
    client: StoreClient, adapters: AsyncAdapters, rig: tuple[RunningStore, StoreClient], redis_url: str
) -> None:
    tensors, config = tensors_of(1)
    for name in (next(iter(tensors)), list(tensors)[-1]):
        with pytest.raises(ZeroDivisionError, match="the device is lost"):
            await adapters.push("a", tensors | {name: Lost(tensors[name])}, config)

    await eventually(lambda: rig[0].importer.budget.held_bytes == 0, what="the push's memory is given back")
    assert await client.names() == []
    await assert_no_blob(redis_url)
    await adapters.push("a", tensors, config)


async def test_a_push_whose_client_is_closed_says_so_and_leaves_nothing(
    client: StoreClient, rig: tuple[RunningStore, StoreClient], redis_url: str
) -> None:
    tensors, config = tensors_of(1)
    closing = AsyncClient("127.0.0.1:1", store_target=f"127.0.0.1:{rig[0].grpc_port}")
    loop = asyncio.get_running_loop()
    last = list(tensors)[-1]
    lost = Lost(tensors[last], lambda: asyncio.run_coroutine_threadsafe(closing.close(), loop).result(30))

    with pytest.raises((CancelledRequestError, ZeroDivisionError)):
        await closing.adapters.push("a", tensors | {last: lost}, config)

    await eventually(lambda: rig[0].importer.budget.held_bytes == 0, what="the push's memory is given back")
    assert await client.names() == []
    await assert_no_blob(redis_url)


async def test_a_client_that_dies_while_engines_fetch_leaves_nothing(
    client: StoreClient, adapters: AsyncAdapters, redis_url: str
) -> None:
    old = (await adapters.push("a", *tensors_of(1))).revision.digest
    async with attached(client) as peer:
        await hold(peer, old)
        peer.auto_grant = False
        pushing = asyncio.create_task(adapters.push("a", *tensors_of(2), ready_timeout_s=60))
        offer = await peer.received("offer", count=2)
        assert offer.digest != old
        pushing.cancel()

        await assert_no_blob(redis_url, but=1)
    assert await latest(client) == old


async def test_a_staged_push_moves_no_label_and_waits_for_no_engine(
    client: StoreClient, adapters: AsyncAdapters
) -> None:
    old = (await adapters.push("a", *tensors_of(1))).revision.digest
    async with attached(client) as peer:
        await hold(peer, old)
        peer.auto_grant = False

        staged = await adapters.push("a", *tensors_of(2), stage=True, ready_timeout_s=60)

    assert await latest(client) == old
    assert await latest(client, f"a@{staged.revision.digest[:12]}") == staged.revision.digest


async def test_a_name_keeps_its_newest_pushed_revisions_and_engines_drop_the_others(
    client: StoreClient, adapters: AsyncAdapters, redis_url: str
) -> None:
    imported = (await client.upload_recipe("a", Recipe(seed=100))).revision.revision
    async with attached(client) as peer:
        await hold(peer, imported)
        pushed = [(await adapters.push("a", *tensors_of(seed))).revision.digest for seed in range(6)]
        # The label's own, two more that were pushed, and what an import left: that is kept as ever.
        kept = [*reversed(pushed[-3:]), imported]
        assert [each.digest async for each in adapters.revisions("a")] == kept
        for digest in pushed[:3]:
            await peer.received("drop", digest)
    await assert_no_blob(redis_url, but=4)


async def test_a_revision_that_another_name_has_is_not_dropped(client: StoreClient, adapters: AsyncAdapters) -> None:
    shared = (await adapters.push("a", *tensors_of(0))).revision.digest
    await client.upload_recipe("b", Recipe(seed=0))
    async with attached(client) as peer:
        for seed in range(1, 5):
            await adapters.push("a", *tensors_of(seed))
        await hold(peer, shared)
        assert shared not in [message.drop.digest for message in peer.log]
    assert await latest(client, "b") == shared


async def test_a_repeated_push_is_done_once(client: StoreClient) -> None:
    messages = push_messages("a", 1)
    messages[0].header.request_id = new_id()
    first = await send(client, messages)
    await send(client, push_messages("a", 2))

    again = await send(client, messages)

    assert again.revision == first.revision
    assert again.already_existed
    assert await latest(client) != first.revision.revision


def tensor_with(**fields: Any) -> list[pb.PushAdapterRequest]:
    """Return a push whose first tensor is announced otherwise than it is."""
    messages = push_messages("a", 1)
    for field, value in fields.items():
        if field == "shape":
            messages[0].header.tensors[0].shape[:] = value
        else:
            setattr(messages[0].header.tensors[0], field, value)
    return messages


def spoiled() -> list[pb.PushAdapterRequest]:
    messages = push_messages("a", 1)
    messages[1].data = b"\1" + messages[1].data[1:]
    return messages


def without_tensors() -> list[pb.PushAdapterRequest]:
    messages = push_messages("a", 1)
    messages[0].header.ClearField("tensors")
    return messages


NAMES = [tensor.name for tensor in push_messages("a", 1)[0].header.tensors]
WRONG = [
    (push_messages("a", 1)[1:], InvalidParameterError, "first message must be a header"),
    (push_messages("a", 1)[:-1], AdapterCorruptUploadError, "ended without a finish: [0-9]+ of [0-9]+ bytes"),
    (push_messages("a", 1)[::2], AdapterCorruptUploadError, "truncated: [0-9]+ of [0-9]+ bytes"),
    (
        [*push_messages("a", 1)[:2], *push_messages("a", 1)[1:]],
        AdapterCorruptUploadError,
        "more bytes than the announced",
    ),
    ([*push_messages("a", 1)[:1], *push_messages("a", 1)], InvalidParameterError, "message header may not come"),
    (spoiled(), AdapterCorruptUploadError, "sha256 of the tensors is"),
    (without_tensors(), InvalidParameterError, "0 tensors"),
    (tensor_with(shape=[1, 1]), AdapterCorruptUploadError, "more bytes than the announced"),
    (tensor_with(shape=[1] * 9), InvalidParameterError, "at most 8 dimensions"),
    (tensor_with(shape=[2**31, 2**31]), AdapterCorruptUploadError, "max-adapter-bytes"),
    (tensor_with(dtype="F64"), AdapterIncompatibleError, "dtype 'F64' is not one of F32, F16, BF16"),
    (tensor_with(name=""), InvalidParameterError, "is no tensor's name"),
    (tensor_with(name=NAMES[1]), InvalidParameterError, "is announced twice"),
    (tensor_with(name="model.strange"), AdapterIncompatibleError, "model.strange"),
    (push_messages("a", 1, ready_timeout_s=121.0), InvalidParameterError, "121 s is not between 0 and 120 s"),
    (push_messages("no name", 1), InvalidParameterError, "is no adapter name"),
]


async def test_what_is_wrong_with_a_push_is_named_and_nothing_is_left(client: StoreClient, redis_url: str) -> None:
    for messages, error, match in WRONG:
        with refused(error, match):
            await send(client, messages)

    assert await client.names() == []
    await assert_no_blob(redis_url)


async def test_a_value_that_is_no_number_is_refused_by_its_tensor(adapters: AsyncAdapters) -> None:
    values, config = tensors_of(1)
    name = next(iter(values))
    values[name][0, 0] = np.nan

    with pytest.raises(AdapterCorruptUploadError, match=f"{name} holds 1 NaN of its {values[name].size} values"):
        await adapters.push("a", values, config)


async def test_a_repeated_rollback_is_done_once(client: StoreClient, adapters: AsyncAdapters) -> None:
    first, second = [(await adapters.push("a", *tensors_of(n))).revision.digest for n in (1, 2)]
    request = pb.RollBackAliasRequest(name="a", request_id=new_id())

    answers = [await client.stub.RollBackAlias(request) for _ in range(3)]

    assert {(each.left_revision, each.revision) for each in answers} == {(second, first)}
    assert await latest(client) == first


async def test_a_label_is_rolled_back_to_what_it_left_last(client: StoreClient, adapters: AsyncAdapters) -> None:
    first, second = [(await adapters.push("a", *tensors_of(n))).revision.digest for n in (1, 2)]
    await set_alias(client, "a", "prod", first)

    back = await adapters.roll_back("a")

    assert (back.left_revision, back.revision, back.adapter.aliases["latest"]) == (second, first, first)
    with pytest.raises(AdapterNotFoundError, match="a:prod has left no revision"):
        await adapters.roll_back("a", label="prod")
    with pytest.raises(AdapterNotFoundError, match="no label 'dev'"):
        await adapters.roll_back("a", label="dev")
    with pytest.raises(ConflictError, match="not at"):
        await adapters.roll_back("a", expected_revision=second)
    assert (await adapters.roll_back("a")).revision == second
    told = [(each.label, each.left_revision, each.revision, each.cause) async for each in adapters.moves("a")]
    assert told == [
        ("latest", first, second, "rollback"),
        ("latest", second, first, "rollback"),
        ("prod", "", first, "alias"),
        ("latest", first, second, "push"),
        ("latest", "", first, "push"),
    ]
    assert [each.label async for each in adapters.moves("a", label="prod")] == ["prod"]
