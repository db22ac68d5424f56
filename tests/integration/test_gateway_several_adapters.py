"""Requests that name several adapters with weights: what engines get, what is refused, and streams that move or break."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
import structlog
from loraplex.v1 import engine_pb2, gateway_pb2
from loraplex_common.auth import ANYBODY
from loraplex_common.errors import (
    AdapterIncompatibleError,
    AdapterNotFoundError,
    InvalidParameterError,
    LoraplexError,
    NotSupportedError,
    ResumeInvalidError,
)
from loraplex_common.rpc_errors import error_from_rpc
from support.cut_streams import CUT, NUM_TOKENS, another_gateway, cut, long_text, read_all, read_up_to, refusal, rest_of
from support.gateway_rig import DIGEST, OTHER_DIGEST, Rig, letters, running_gateway, text_request
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration

Weighted = gateway_pb2.WeightedAdapter
Once = gateway_pb2.GenerateOnceRequest
CRITIC, NOVICE = "12" * 32, "34" * 32


def weighted(*pairs: tuple[str, float | None]) -> list[gateway_pb2.WeightedAdapter]:
    return [Weighted(name=name, weight=weight) for name, weight in pairs]


BOTH = weighted(("poet", 0.5), ("critic", 0.25))


async def put_critic(rig: Rig, *, label: str = CRITIC, **entry: Any) -> None:
    """Publish `critic`, whose label `latest` is at a revision, beside the adapters that every rig has."""
    labels = {"latest": label, "old": CRITIC, "new": NOVICE}
    rig.store.put("critic", labels, fingerprint=rig.engine.base.fingerprint, **entry)
    names = rig.app.names
    await eventually(lambda: (entry := names.entry("critic", ANYBODY)) and entry.labels["latest"] == label)


def terms_of(submit: engine_pb2.Submit) -> list[tuple[str, float]]:
    more = [(term.digest, term.scale) for term in submit.more_adapters]
    return [(submit.adapter_digest, submit.adapter_scale), *more]


async def once(rig: Rig, **fields: Any) -> gateway_pb2.GenerateOnceResponse:
    return await rig.stub.GenerateOnce(Once(request=text_request(**fields)), timeout=20)


async def failure(rig: Rig, **fields: Any) -> LoraplexError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await once(rig, **fields)
    return error_from_rpc(caught.value)


async def test_an_engine_gets_all_of_them_in_order_with_their_weights(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        await put_critic(rig)

        with structlog.testing.capture_logs() as logs:
            answer = await once(rig, adapters=[*BOTH, Weighted(name="poet:prod")])

        (line,) = [line for line in logs if line["event"] == "request"]
        assert line["adapter"] == "poet*0.5 + critic*0.25 + poet:prod"
        assert line["adapter_revision"] == f"{DIGEST}, {CRITIC}, {OTHER_DIGEST}"
        (submit,) = rig.engine.submits
        assert terms_of(submit)[:2] == [(DIGEST, 0.5), (CRITIC, 0.25)]
        assert submit.more_adapters[1].digest == OTHER_DIGEST
        assert not submit.more_adapters[1].HasField("scale")
        assert submit.fairness_key == "poet+critic+poet"
        assert list(answer.started.adapter_revisions) == [DIGEST, CRITIC, OTHER_DIGEST]
        assert answer.started.adapter_revision == DIGEST
        await eventually(lambda: len(rig.store.prefetched) == 3)
        assert {digest for digest, _ in rig.store.prefetched} == {DIGEST, CRITIC, OTHER_DIGEST}
        async with httpx.AsyncClient() as http:
            metrics = (await http.get(rig.metrics)).text
        assert 'requests_total{adapter="(several)",code="OK",model="tiny"} 1.0' in metrics
        rig.check_idle()


async def test_a_list_of_one_is_adapter_with_adapter_scale(valkey_url: str) -> None:
    fields: dict[str, Any] = {"request_id": "r", "sampling": gateway_pb2.SamplingParams(seed=3)}
    async with running_gateway(valkey_url) as rig:
        plain = await once(rig, adapter="poet", adapter_scale=0.5, **fields)
        listed = await once(rig, adapters=weighted(("poet", 0.5)), **fields)

        one, other = rig.engine.submits
        other.time_left.CopyFrom(one.time_left)
        assert one == other
        assert (list(plain.started.adapter_revisions), list(listed.started.adapter_revisions)) == ([], [DIGEST])
        assert listed.started.adapter_revision == DIGEST


REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"adapter": "poet", "adapters": BOTH}, "adapters", "leave adapter out"),
    ({"adapter_scale": 1.0, "adapters": BOTH}, "adapter_scale", "a weight of its own"),
    ({"adapters": weighted(*[("poet", 1.0)] * 9)}, "adapters", "adapters has 9 entries; at most 8 are allowed"),
    ({"adapters": weighted(("", 1.0))}, "adapters[0].name", "is empty"),
    ({"adapters": weighted(("poet", 1.0), ("a b", 1.0))}, "adapters[1].name", "is no adapter name"),
    ({"adapters": weighted(("poet", 100.5))}, "adapters[0].weight", "it must be in [0, 100]"),
    ({"adapters": weighted(("poet", -0.5))}, "adapters[0].weight", "it must be in [0, 100]"),
    ({"adapters": weighted(("poet", float("nan")))}, "adapters[0].weight", "it must be in [0, 100]"),
    ({"adapters": weighted(("poet", float("inf")))}, "adapters[0].weight", "it must be in [0, 100]"),
    ({"adapters": weighted(("poet", 0.5), ("poet", 0.5))}, "adapters[1].name", "add their weights"),
    ({"adapters": weighted(("poet", 0.5), (f"poet@{DIGEST[:8]}", 0.5))}, "adapters[1].name", "add their weights"),
]


async def test_what_no_list_may_say_is_refused_by_name(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        await put_critic(rig)
        for fields, field, words in REFUSALS:
            error = await failure(rig, **fields)
            assert isinstance(error, InvalidParameterError), fields
            assert error.field == field, fields
            assert words in error.message, fields

        assert isinstance(await failure(rig, adapters=weighted(("poet", 1.0), ("nobody", 1.0))), AdapterNotFoundError)
        mixed = await failure(rig, adapters=weighted(("poet", 1.0), ("stranger", 1.0)))
        assert isinstance(mixed, AdapterIncompatibleError)
        assert mixed.metadata["adapter"] == "stranger"
        assert not rig.engine.submits
        for weights in ((0.0, 100.0), (-0.0, 1e-40)):
            await once(rig, adapters=weighted(*zip(("poet", "critic"), weights, strict=True)))
        rig.check_idle()


async def test_a_tenant_may_use_each_of_them_or_is_told_that_there_is_none(valkey_url: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("key-v vip\nkey-o other\n")
    adapters = weighted(("critic", 0.5), ("secret", 0.5))
    options: dict[str, Any] = {"api_keys_file": keys}
    async with running_gateway(valkey_url, **options, channel_options={"api_key": "key-o"}) as rig:
        await put_critic(rig)
        error = await failure(rig, adapters=adapters)
        assert isinstance(error, AdapterNotFoundError)
        assert "secret" in error.message
        assert not rig.engine.submits
    async with running_gateway(valkey_url, **options, channel_options={"api_key": "key-v"}) as rig:
        await put_critic(rig)
        await once(rig, adapters=adapters)
        assert terms_of(rig.engine.submits[0]) == [(CRITIC, 0.5), (DIGEST, 0.5)]


async def test_labels_that_move_change_neither_a_stream_that_moves_nor_one_that_is_resumed(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=2) as rig:
        await put_critic(rig)
        for engine in rig.engines:
            engine.hold_at = 5
        request = long_text(adapters=BOTH)
        call = rig.stub.Generate(request, timeout=30)
        got = await read_up_to(call, request, 5)
        lost = next(engine for engine in rig.engines if engine.submits)
        (other,) = [engine for engine in rig.engines if engine is not lost]

        await put_critic(rig, label=NOVICE)
        other.hold_at = 9
        await lost.kill()
        got.responses += (await read_up_to(call, request, 4)).responses
        call.cancel()
        await eventually(lambda: rig.app.claims.num_running == 0)
        other.release()
        async with another_gateway(valkey_url) as second:
            second.store.put("critic", {"latest": NOVICE, "old": CRITIC}, fingerprint=other.base.fingerprint)
            await eventually(lambda: second.app.names.entry("critic", ANYBODY))
            responses = await read_all(second, got.resumed())

        moved, resumed = other.submits
        assert terms_of(lost.submits[0]) == terms_of(moved) == terms_of(resumed) == [(DIGEST, 0.5), (CRITIC, 0.25)]
        assert list(responses[0].started.adapter_revisions) == [DIGEST, CRITIC]
        tokens = [*got.token_ids, *(token for response in responses for token in response.chunk.token_ids)]
        assert tokens == list(letters(moved))
        assert len(tokens) == NUM_TOKENS


@pytest.mark.parametrize(
    "changes",
    [
        {"adapters": weighted(("critic", 0.25), ("poet", 0.5))},
        {"adapters": weighted(("poet", 0.5), ("critic", 0.5))},
        {"adapters": weighted(("poet", 0.25), ("critic", 0.25))},
        {"adapters": weighted(("poet", 0.5))},
        {"adapters": weighted(("poet", 0.5), ("critic", 0.25), ("poet:prod", 0.0))},
        {"adapters": [], "adapter": "poet", "adapter_scale": 0.5},
        {"adapters": []},
    ],
    ids=lambda changes: str(changes).replace("\n", " ")[:60],
)
async def test_a_list_that_is_not_the_streams_does_not_resume_it(valkey_url: str, changes: dict[str, Any]) -> None:
    async with running_gateway(valkey_url) as rig:
        await put_critic(rig)
        got = await cut(rig, long_text(adapters=BOTH))

        error = await refusal(rig, got.resumed(**changes))

        assert isinstance(error, ResumeInvalidError)
        assert error.metadata == {"cause": "changed"}
        assert (await read_all(rig, got.resumed()))[-1].HasField("finished")


async def test_a_stream_of_a_list_of_one_goes_on_as_adapter_and_the_other_way_round(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        listed = await cut(rig, long_text(adapters=weighted(("poet", 0.5))))
        single = listed.resumed(adapters=[], adapter="poet", adapter_scale=0.5)
        assert len((await read_all(rig, single))[0].started.adapter_revision) == 64
        plain = await cut(rig, long_text(adapter="poet", adapter_scale=0.5))
        again = plain.resumed(adapter="", adapters=weighted(("poet", 0.5)))
        again.ClearField("adapter_scale")
        await read_all(rig, again)

        assert len(rig.engine.submits) == 4
        assert [len(submit.resumed_token_ids) for submit in rig.engine.submits] == [0, CUT, 0, CUT]


async def test_the_longest_names_of_the_most_adapters_can_be_resumed(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        names = [f"{n}{'a' * 127}/{'b' * 128}" for n in range(8)]
        for n, name in enumerate(names):
            rig.store.put(name, {"latest": f"{n}" * 64}, fingerprint=rig.engine.base.fingerprint)
        await eventually(lambda: rig.app.names.entry(names[-1], ANYBODY))
        got = await cut(rig, long_text(adapters=weighted(*[(name, 0.125) for name in names])))

        responses = await read_all(rig, got.resumed())

        assert [digest[0] for digest in responses[0].started.adapter_revisions] == [*"01234567"]


async def test_an_engine_that_would_take_the_first_alone_never_gets_a_list(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=2) as rig:
        await put_critic(rig)
        old, new = rig.engines
        old.sums_adapters = False
        await old.register(rig.valkey)
        await eventually(lambda: any(not link.record.sums_adapters for link in rig.app.pool.links))
        for _ in range(4):
            await once(rig, adapters=BOTH)
        assert (len(old.submits), len(new.submits)) == (0, 4)

        new.sums_adapters = False
        await new.register(rig.valkey)
        await eventually(lambda: not any(link.record.sums_adapters for link in rig.app.pool.links))
        error = await failure(rig, adapters=BOTH)
        assert isinstance(error, NotSupportedError)
        assert "name one adapter" in error.message
        await once(rig, adapters=weighted(("poet", 0.5)))


async def test_the_engine_with_most_of_their_bytes_is_asked(valkey_url: str) -> None:
    held: dict[int, set[str]] = {0: {DIGEST}, 1: {CRITIC}, 2: set()}
    async with running_gateway(valkey_url, num_engines=3, resident_on=held) as rig:
        await put_critic(rig, num_bytes={CRITIC: 1000})
        for _ in range(3):
            await once(rig, adapters=BOTH)
            await once(rig, adapters=[BOTH[1], BOTH[0]])

        assert [len(engine.submits) for engine in rig.engines] == [0, 6, 0]
        assert rig.store.prefetched == [(DIGEST, rig.engines[1].engine_id)]


async def test_tokens_are_counted_with_a_list_too(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        await put_critic(rig)
        asked = gateway_pb2.CountTokensRequest(text="the quick", adapters=BOTH)
        counted = await rig.stub.CountTokens(asked)
        tokens = await rig.stub.Tokenize(gateway_pb2.TokenizeRequest(text="the quick", adapters=BOTH))
        assert counted.num_tokens == len(tokens.token_ids) > 0

        asked.adapter = "poet"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.CountTokens(asked)
        assert error_from_rpc(caught.value).field == "adapters"


async def test_streams_of_lists_hold_their_adapters_in_the_gauges_that_routers_read(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        await put_critic(rig)
        rig.engine.hold_at = 3
        request = long_text(adapters=BOTH)
        call = rig.stub.Generate(request)
        await read_up_to(call, request, 3)
        (link,) = rig.app.pool.links
        assert link.digests_in_flight == {DIGEST, CRITIC}

        rig.engine.release()
        await rest_of(call)
        await eventually(lambda: not link.digests_in_flight)
