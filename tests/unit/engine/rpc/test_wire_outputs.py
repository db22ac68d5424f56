from __future__ import annotations

import numpy as np
import pytest
from google.rpc import code_pb2
from loraplex.v1 import adapter_pb2, engine_pb2, gateway_pb2
from loraplex_common.error_status import from_status
from loraplex_common.errors import RequestTooLargeError
from loraplex_engine.loop.load_report import LoadSnapshot
from loraplex_engine.messages import (
    Ended,
    FinishReason,
    Loading,
    PromptLogprobs,
    ResidencyState,
    SessionEvent,
    Started,
    StepOutputs,
    TokenWithLogprobs,
)
from loraplex_engine.rpc import wire
from loraplex_engine.rpc.output_encoder import MAX_MESSAGE_BYTES, OutputEncoder
from loraplex_engine.step import TokenLogprobs


def logprobs(*token_ids: int) -> TokenLogprobs:
    values = -np.arange(1, len(token_ids) + 1, dtype=np.float32)
    return TokenLogprobs(token_ids=np.array(token_ids, dtype=np.int32), logprobs=values)


def make_step(*events: SessionEvent, tokens: tuple[tuple[int, int, int], ...] = ()) -> StepOutputs:
    slots, positions, ids = np.array(tokens, dtype=np.int32).reshape(-1, 3).T
    return StepOutputs(step_id=5, token_slots=slots, token_positions=positions, token_ids=ids, events=list(events))


def make_started(slot: int = 1) -> Started:
    return Started(session_slot=slot, cached_tokens=4, queue_s=0.5, adapter_load_s=0.25)


def make_encoder() -> OutputEncoder:
    return OutputEncoder(lambda slot: pytest.fail(f"slot {slot} was aborted"))


def encode(step: StepOutputs, encoder: OutputEncoder | None = None) -> list[engine_pb2.SessionResponse]:
    return list((encoder or make_encoder()).encode(step))


def test_plain_tokens_are_three_packed_arrays() -> None:
    (message,) = encode(make_step(tokens=((1, 10, 100), (2, 0, 200))))

    assert message.step == 5
    assert list(message.token_slots) == [1, 2]
    assert list(message.token_sequences) == [10, 0]
    assert list(message.token_ids) == [100, 200]
    assert not message.outputs


def test_events_become_outputs_in_order() -> None:
    end = Ended(session_slot=1, finish_reason=FinishReason.STOP, stop_token_id=2, queue_s=1, decode_s=3, kv_page_s=2.5)
    token = TokenWithLogprobs(session_slot=1, position=7, token_id=42, logprobs=logprobs(42, 43))
    loading = Loading(session_slot=1, state=ResidencyState.IN_ARENA, bytes_done=1, bytes_total=2)

    (message,) = encode(make_step(loading, make_started(), token, end))

    kinds = [[field.name for field, _ in output.ListFields() if field.name != "slot"] for output in message.outputs]
    assert kinds == [["loading"], ["started"], ["sequence", "token_ids", "logprobs"], ["finish", "usage"]]
    assert message.outputs[1].started.cached_tokens == 4
    assert message.outputs[2].logprobs[0].chosen.token_id == 42
    assert [top.token_id for top in message.outputs[2].logprobs[0].top] == [43]
    assert message.outputs[3].finish.finish_reason == gateway_pb2.FINISH_REASON_STOP
    assert message.outputs[3].finish.stop_token_id == 2
    assert message.outputs[3].finish.timings.decode.ToSeconds() == 3
    assert message.outputs[3].usage.kv_page_seconds == 2.5


@pytest.mark.parametrize("reason", list(FinishReason))
def test_every_finish_reason_has_a_name_on_the_wire(reason: FinishReason) -> None:
    message = wire.ended(Ended(session_slot=0, finish_reason=reason)).finish.finish_reason

    assert gateway_pb2.FinishReason.Name(message) == f"FINISH_REASON_{reason.name}"


def test_a_failure_is_a_rich_status() -> None:
    output = wire.ended(Ended(session_slot=3, error=RequestTooLargeError("9 pages > 8", metadata={"pages": "9"})))

    assert output.error.code == code_pb2.FAILED_PRECONDITION
    error = from_status(output.error)
    assert (type(error), error.message, error.metadata) == (RequestTooLargeError, "9 pages > 8", {"pages": "9"})


def test_an_end_without_reason_or_error_is_a_bug() -> None:
    with pytest.raises(ValueError, match="neither"):
        wire.ended(Ended(session_slot=3))


@pytest.mark.parametrize("last", ["plain token", "token with logprobs", "end"])
def test_a_start_waits_for_the_prompts_probabilities(last: str) -> None:
    encoder = make_encoder()
    encoder.expect_prompt_logprobs(1)

    first = encode(make_step(make_started(), PromptLogprobs(session_slot=1, first=1, entries=[logprobs(5)])), encoder)
    second = encode(make_step(PromptLogprobs(session_slot=1, first=2, entries=[logprobs(6)])), encoder)
    if last == "plain token":
        third = encode(make_step(tokens=((1, 0, 9),)), encoder)
    elif last == "token with logprobs":
        token = TokenWithLogprobs(session_slot=1, position=0, token_id=9, logprobs=logprobs(9))
        third = encode(make_step(token), encoder)
    else:
        third = encode(make_step(Ended(session_slot=1, finish_reason=FinishReason.CANCELLED)), encoder)

    assert not first[0].outputs
    assert not second[0].outputs
    started = third[0].outputs[0].started
    assert [entry.chosen.token_id for entry in started.prompt_logprobs] == [5, 6]


def test_a_prompts_probabilities_that_come_with_the_first_token_are_in_the_start() -> None:
    encoder = make_encoder()
    encoder.expect_prompt_logprobs(1)

    first = encode(make_step(make_started(), PromptLogprobs(session_slot=1, first=1, entries=[logprobs(5)])), encoder)
    last_chunk = PromptLogprobs(session_slot=1, first=2, entries=[logprobs(6)])
    second = encode(make_step(last_chunk, tokens=((1, 0, 9),)), encoder)

    assert not first[0].outputs
    assert [entry.chosen.token_id for entry in second[0].outputs[0].started.prompt_logprobs] == [5, 6]
    assert list(second[0].token_ids) == [9]


def test_tokens_never_overtake_a_start_when_outputs_are_split() -> None:
    encoder = make_encoder()
    events: list[SessionEvent] = []
    for slot in range(3):
        encoder.expect_prompt_logprobs(slot)
        entries = [logprobs(*range(1000)) for _ in range(100)]
        events += [make_started(slot), PromptLogprobs(session_slot=slot, first=1, entries=entries)]
    tokens = tuple((slot, 0, 9) for slot in range(3))

    messages = encode(
        make_step(*events, Ended(session_slot=0, finish_reason=FinishReason.LENGTH), tokens=tokens), encoder
    )

    assert len(messages) > 1
    assert sum(len(output.started.prompt_logprobs) for message in messages for output in message.outputs) == 300
    with_tokens = [bool(message.token_ids) for message in messages]
    started = [any(output.HasField("started") for output in message.outputs) for message in messages]
    ended = [any(output.HasField("finish") for output in message.outputs) for message in messages]
    assert max(n for n, has in enumerate(started) if has) <= with_tokens.index(True) <= ended.index(True)
    assert sum(with_tokens) == 1


def test_what_cannot_be_encoded_ends_its_request_once_the_engine_has_let_it_go() -> None:
    aborted: list[int] = []
    encoder = OutputEncoder(aborted.append)
    broken = TokenWithLogprobs(session_slot=1, position=0, token_id=1, logprobs=logprobs())  # not even the drawn token
    sound = TokenWithLogprobs(session_slot=2, position=0, token_id=1, logprobs=logprobs(1))

    first = encode(make_step(make_started(1), make_started(2), broken, sound), encoder)
    assert aborted == [1]
    later = encode(make_step(sound, broken, tokens=((1, 1, 7), (3, 0, 8))), encoder)
    end = encode(make_step(Ended(session_slot=1, finish_reason=FinishReason.CANCELLED)), encoder)
    again = encode(make_step(make_started(1), tokens=((1, 0, 5),)), encoder)

    assert [output.slot for output in first[0].outputs] == [1, 2, 2]
    assert [output.slot for output in later[0].outputs] == [2]
    assert list(later[0].token_slots) == [3]
    (output,) = end[0].outputs
    error = from_status(output.error)
    assert (output.slot, error.reason) == (1, "INTERNAL")
    assert error.metadata["error_id"] in error.message
    assert again[0].outputs[0].HasField("started")
    assert list(again[0].token_ids) == [5]
    assert aborted == [1]


def test_an_end_that_cannot_be_encoded_is_an_internal_error() -> None:
    (message,) = encode(make_step(Ended(session_slot=1)))

    assert from_status(message.outputs[0].error).reason == "INTERNAL"


@pytest.mark.parametrize("is_held", [True, False])
def test_a_start_that_cannot_be_encoded_ends_its_request_only(is_held: bool) -> None:
    aborted: list[int] = []
    encoder = OutputEncoder(aborted.append)
    if is_held:
        encoder.expect_prompt_logprobs(1)
    broken = Started(session_slot=1, cached_tokens=-1, queue_s=0.0, adapter_load_s=0.0)

    (message,) = encode(make_step(broken, make_started(2), tokens=((1, 0, 5), (2, 0, 6))), encoder)

    assert aborted == [1]
    assert list(message.token_slots) == [2]
    assert [output.slot for output in message.outputs] == [2]


def test_other_requests_start_at_once_beside_one_that_is_held_back() -> None:
    encoder = make_encoder()
    encoder.expect_prompt_logprobs(1)

    (message,) = encode(make_step(make_started(1), make_started(2)), encoder)

    assert [output.slot for output in message.outputs] == [2]


def test_outputs_beyond_a_mebibyte_are_split() -> None:
    token = TokenWithLogprobs(session_slot=1, position=0, token_id=1, logprobs=logprobs(*range(1000)))

    messages = encode(make_step(*[token] * 300))

    assert len(messages) > 1
    assert all(message.ByteSize() <= MAX_MESSAGE_BYTES + 4096 for message in messages)
    assert sum(len(message.outputs) for message in messages) == 300


@pytest.mark.parametrize("state", list(ResidencyState))
def test_a_tier_is_said_only_of_a_copy_that_this_engine_has(state: ResidencyState) -> None:
    is_here = state not in (ResidencyState.ABSENT, ResidencyState.WANTED)
    loading = wire.loading(Loading(session_slot=1, state=state, bytes_done=0, bytes_total=0))

    assert (loading.loading.tier != adapter_pb2.TIER_UNSPECIFIED) == is_here
    assert loading.loading.tier != adapter_pb2.TIER_STORE


@pytest.mark.parametrize("state", list(ResidencyState))
def test_every_state_of_residency_has_a_tier(state: ResidencyState) -> None:
    on_device = state in (ResidencyState.RESIDENT, ResidencyState.DRAINING)

    assert (wire.tier(state) == adapter_pb2.TIER_DEVICE) == on_device
    assert wire.resident_state(state) in engine_pb2.ResidentAdapter.State.values()


def test_the_load_report_says_what_the_snapshot_says() -> None:
    names = [field.name for field in engine_pb2.LoadReport.DESCRIPTOR.fields]
    values = {name: index + 1 for index, name in enumerate(names)} | {"draining": True}

    report = wire.load_report(LoadSnapshot(**values))  # type: ignore[arg-type]

    assert {name: getattr(report, name) for name in names} == values
