"""Frames of a stream are put together from pieces; they are what the general renderer says of every event."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from loraplex_common.errors import NoEngineError
from loraplex_gateway.openai.convert import Plan
from loraplex_gateway.openai.errors import BodyNames
from loraplex_gateway.openai.fields import CHAT, COMPLETION
from loraplex_gateway.openai.openai_answer import DONE, OpenAIAnswer
from loraplex_gateway.openai.render import Renderer
from loraplex_gateway.types import (
    Chunk,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    PositionLogprobs,
    Started,
    TextPrompt,
    Timings,
    TokenLogprob,
    Usage,
)

if TYPE_CHECKING:
    import pytest

TEXTS = st.text(max_size=20) | st.sampled_from(['"\\\n\x00', "\u2028\ud7ff", "data: [DONE]\n\n", "\U0001f600"])
LOGPROBS = st.builds(
    PositionLogprobs,
    chosen=st.builds(TokenLogprob, token_id=st.just(7), logprob=st.floats(-50, 0), text=TEXTS, data=st.binary()),
)
CHUNKS = st.builds(
    Chunk,
    sequence=st.integers(0, 9),
    index=st.integers(0, 9),
    token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple),
    text=TEXTS,
    logprobs=st.just(()) | st.lists(LOGPROBS, max_size=2).map(tuple),
)
STARTS = st.builds(
    Started,
    prompt_tokens=st.integers(1, 9),
    cached_tokens=st.just(0),
    engine_id=st.just("e"),
    adapter_revision=st.sampled_from(["", "ab" * 32]),
    seed=st.just(1),
)
ENDS = st.builds(
    Finished,
    finish_reason=st.sampled_from(FinishReason),
    stop_string=st.none() | TEXTS,
    usage=st.builds(Usage, prompt_tokens=st.just(3), output_tokens=st.integers(0, 9), cached_tokens=st.just(0)),
    timings=st.just(Timings()),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    is_chat, has_usage = draw(st.booleans()), draw(st.booleans())
    request = GenerationRequest(prompt=TextPrompt(text="x"))
    return Plan(
        requests=(request,) * draw(st.integers(1, 3)),
        model=draw(TEXTS),
        names=BodyNames(CHAT if is_chat else COMPLETION),
        is_chat=is_chat,
        is_stream=True,
        include_usage=has_usage,
        has_running_usage=has_usage and draw(st.booleans()),
        logprobs=draw(st.none() | st.integers(0, 2)),
        return_token_ids=draw(st.booleans()),
    )


@st.composite
def streams(draw: st.DrawFn) -> tuple[Plan, list[tuple[int, Event]]]:
    """A plan and the events of its choices, side by side in any order, each beginning with its start."""
    plan = draw(plans())
    choices: list[list[Event]] = [
        [draw(STARTS), *draw(st.lists(CHUNKS, max_size=5)), draw(ENDS)] for _ in range(len(plan.requests))
    ]
    turns = draw(st.permutations([n for n, events in enumerate(choices) for _ in events]))
    iterators = [iter(events) for events in choices]
    return plan, [(choice, next(iterators[choice])) for choice in turns]


def decoded(frame: bytes) -> Any:
    assert frame[:6] + frame[-2:] == b"data: \n\n"
    assert frame.count(b"\n") == 2
    return msgspec.json.decode(frame[6:])


@given(streams())
def test_every_frame_holds_what_the_general_renderer_says(stream: tuple[Plan, list[tuple[int, Event]]]) -> None:
    plan, events = stream
    answer, renderer = OpenAIAnswer(plan), Renderer(plan, request_id="")
    renderer._id, renderer._created = answer._renderer._id, answer._renderer._created

    for choice, event in events:
        frame, expected = answer.frame(choice, event), renderer.chunk(choice, event)

        assert (decoded(frame) if frame else None) == expected
    tail = answer.end()

    assert tail.endswith(DONE)
    if plan.include_usage:
        assert decoded(tail.removesuffix(DONE)) == renderer.usage_chunk()


def plain_plan(*, include_usage: bool) -> Plan:
    return Plan(
        requests=(GenerationRequest(prompt=TextPrompt(text="x")),),
        model="m",
        names=BodyNames(CHAT),
        is_chat=True,
        is_stream=True,
        include_usage=include_usage,
        has_running_usage=False,
        logprobs=None,
        return_token_ids=False,
    )


def test_of_a_choices_plain_chunks_only_the_first_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    render = Mock(wraps=Renderer.chunk)
    monkeypatch.setattr(Renderer, "chunk", lambda *args: render(*args))
    answer = OpenAIAnswer(plain_plan(include_usage=False))

    for n in range(10):
        answer.frame(0, Chunk(sequence=n, index=n, token_ids=(n,), text="x"))

    assert render.call_count == 1


def test_a_stream_that_fails_ends_in_the_error_and_the_mark_of_the_end() -> None:
    tail = OpenAIAnswer(plain_plan(include_usage=True)).failure(NoEngineError("none is ready"))

    assert tail.endswith(DONE)
    assert decoded(tail.removesuffix(DONE))["error"]["reason"] == "NO_ENGINE"
