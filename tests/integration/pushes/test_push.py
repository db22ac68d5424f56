"""Tensors that a trainer pushes: stored as their file would be, brought to engines, and only then what labels mean."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import torch
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.errors import AdapterNotFoundError, ConflictError
from loraplex_common.valkey import connect
from support.adapters import Recipe
from support.pushes import (
    adapters_at,
    assert_no_blob,
    attached,
    hold,
    latest,
    push_messages,
    send,
    tensors_of,
)
from support.store_rig import (
    StoreClient,
    new_id,
    running_rig,
    set_alias,
    store_config,
)
from support.waiting import eventually

if TYPE_CHECKING:
    from loraplex_client import AsyncAdapters

pytestmark = pytest.mark.integration


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
