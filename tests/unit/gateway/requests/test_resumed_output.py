"""What a client has after some tokens depends on the tokens alone, so that a stream cut anywhere goes on exactly there."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.v1 import gateway_pb2
from loraplex_common.errors import ResumeInvalidError
from loraplex_gateway.engines.ticket import EngineUpdate
from loraplex_gateway.engines.wire import EngineFinish, EngineStart
from loraplex_gateway.requests.prepared import Continuation, PreparedRequest
from loraplex_gateway.requests.run import REPLAY_TOKENS, RequestRun
from loraplex_gateway.requests.times import RequestTimes
from loraplex_gateway.text.token_table import TokenTable
from loraplex_gateway.types import (
    Chunk,
    Finished,
    FinishReason,
    GenerationRequest,
    Priority,
    ResponseOptions,
    Resume,
    Sampling,
    Started,
    Stopping,
    TextPrompt,
    Timings,
)
from support.tokenizers_for_tests import byte_fallback_tokenizer, byte_level_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_gateway.types import Event

BYTE_LEVEL, BYTE_FALLBACK = TokenTable(byte_level_tokenizer()), TokenTable(byte_fallback_tokenizer())
PLAIN, EVERYTHING = Stopping(), ResponseOptions()
STARTED = EngineStart(cached_tokens=0, queue_s=0.0, adapter_load_s=0.0, prompt_logprobs=())


def token_ids(table: TokenTable, text: str) -> list[int]:
    return list(table.tokenizer.encode(text, add_special_tokens=False).ids)


def logprob(token_id: int) -> gateway_pb2.PositionLogprobs:
    return gateway_pb2.PositionLogprobs(chosen=gateway_pb2.TokenLogprob(token_id=token_id, logprob=-0.5))


@dataclass(frozen=True, kw_only=True)
class Output:
    """A request, and all tokens that engines will give for it, however often it moves."""

    table: TokenTable = BYTE_LEVEL
    tokens: tuple[int, ...] = ()
    stopping: Stopping = PLAIN
    stop_token_ids: frozenset[int] = frozenset()
    options: ResponseOptions = EVERYTHING
    prompt_ids: tuple[int, ...] = (5,)

    def prepared(self, resume: Resume | None = None, *, time_limit_s: float | None = 5.0) -> PreparedRequest:
        most = self.stopping.max_new_tokens or len(self.tokens)
        continuation = None
        if resume is not None:
            continuation = Continuation(token_ids=resume.token_ids, max_new_tokens=most, time_limit_at=None)
        return PreparedRequest(
            request=GenerationRequest(
                prompt=TextPrompt(text="hi"),
                stopping=self.stopping,
                options=self.options,
                resume=resume,
                time_limit_s=time_limit_s,
            ),
            model=cast("Any", SimpleNamespace(tokenizer=SimpleNamespace(table=self.table), fingerprint="f")),
            adapters=(),
            prompt_ids=self.prompt_ids,
            sampling=Sampling(seed=7),
            stop_token_ids=self.stop_token_ids,
            max_new_tokens=most,
            priority=Priority.NORMAL,
            fairness_key="",
            cache_salt="",
            affinity_key="",
            deadline=60.0,
            queue_deadline=None,
            continuation=continuation,
        )

    def run(self, resume: Resume | None = None, *, time_limit_s: float | None = 5.0) -> RequestRun:
        """Return what serves the request, or the rest of it."""
        prepared = self.prepared(resume, time_limit_s=time_limit_s)
        return RequestRun(prepared, RequestTimes(lambda: 0.0), token=lambda _: "token")

    def serve(self, run: RequestRun, position: int, sizes: Sequence[int]) -> list[Event]:
        """Return the events of an engine that goes on at a position, so many tokens at a time, until its end."""
        events = run.events("e", EngineUpdate(started=STARTED))
        sizes = [*sizes, len(self.tokens) + 1]
        while not run.is_finished:
            size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
            fresh = self.tokens[position : position + size]
            for n in range(len(fresh)):
                if run.prepared.finish_reached(self.tokens[: position + n + 1]) is not None:
                    fresh = fresh[: n + 1]
                    break
            position += len(fresh)
            reached = run.prepared.finish_reached(self.tokens[:position])
            if reached is None and position == len(self.tokens):
                reached = EngineFinish(reason=FinishReason.TIME_LIMIT, stop_token_id=None, timings=Timings())
            logprobs = [logprob(token) for token in fresh] if self.options.logprobs is not None else []
            events += run.events("e", EngineUpdate(token_ids=fresh, logprobs=logprobs, end=reached))
        return events


@dataclass
class Client:
    """What a client has got so far."""

    token_ids: list[int] = field(default_factory=list)
    logprob_ids: list[int] = field(default_factory=list)
    text: str = ""
    next_sequence: int = 0
    finished: Finished | None = None

    def take(self, events: Sequence[Event]) -> None:
        for event in events:
            assert self.finished is None
            if isinstance(event, Chunk):
                assert (event.sequence, event.index) == (self.next_sequence, len(self.token_ids))
                self.next_sequence += 1
                self.token_ids += event.token_ids
                self.logprob_ids += [entry.chosen.token_id for entry in event.logprobs]
                self.text += event.text
            elif isinstance(event, Finished):
                self.finished = event

    def resume(self) -> Resume:
        return Resume(
            token="token",
            last_sequence=max(0, self.next_sequence - 1),
            token_ids=tuple(self.token_ids),
            num_text_bytes=len(self.text.encode()),
        )


def rest_of(output: Output, resume: Resume, sizes: Sequence[int] = ()) -> list[Event]:
    run = output.run(resume)
    last = asyncio.run(run.replay(resume))
    return last or output.serve(run, len(resume.token_ids), sizes)


SIZES = st.lists(st.integers(1, 5), max_size=12)
STOPS = st.lists(
    st.sampled_from(["lo", "hello", "o w", "d", "\ufffd", "</s>", "world!", "ü", "好 ", "ell", "b"]),
    max_size=3,
    unique=True,
)


@st.composite
def outputs(draw: st.DrawFn) -> Output:
    table = draw(st.sampled_from([BYTE_LEVEL, BYTE_FALLBACK]))
    texts = ["hello world", "grüße", "你好 世界", "\U0001f600", "o wor", "STOP", " "]
    pieces = st.one_of(
        st.sampled_from([tuple(token_ids(table, text)) for text in texts]),
        st.integers(0, 270).map(lambda token_id: (token_id,)),
    )
    tokens = tuple(token for piece in draw(st.lists(pieces, min_size=1, max_size=8)) for token in piece)
    is_cut_by_length = draw(st.booleans())
    least = draw(st.sampled_from([None, 0, 3, len(tokens)]))
    return Output(
        table=table,
        tokens=tokens,
        stopping=Stopping(
            max_new_tokens=max(draw(st.integers(1, len(tokens))), least or 0) if is_cut_by_length else len(tokens) + 9,
            min_new_tokens=least,
            stop_strings=tuple(draw(STOPS)),
            include_stop=draw(st.booleans()),
        ),
        stop_token_ids=frozenset(draw(st.lists(st.sampled_from(tokens), max_size=2))),
        options=ResponseOptions(
            text=draw(st.sampled_from([True, True, False])),
            logprobs=draw(st.sampled_from([None, 1])),
            skip_special_tokens=draw(st.booleans()),
        ),
        prompt_ids=tuple(token_ids(table, draw(st.sampled_from(["hi", "\U0001f600"])))[: draw(st.integers(1, 3))]),
    )


@settings(max_examples=400, deadline=None)
@given(output=outputs(), sizes=SIZES, cuts=st.lists(st.integers(0, 12), min_size=1, max_size=3), again=SIZES)
def test_a_stream_cut_anywhere_and_resumed_ends_as_one_that_was_not(
    output: Output, sizes: list[int], cuts: list[int], again: list[int]
) -> None:
    whole = Client()
    whole.take(output.serve(output.run(), 0, sizes))
    client = Client()
    client.take(output.serve(output.run(), 0, sizes)[: cuts[0]])

    for cut in cuts[1:]:
        if client.finished is None:
            client.take(rest_of(output, client.resume(), again)[:cut])
    if client.finished is None:
        client.take(rest_of(output, client.resume(), again))

    assert (client.text, client.token_ids, client.logprob_ids) == (whole.text, whole.token_ids, whole.logprob_ids)
    assert client.finished is not None
    assert whole.finished is not None
    assert (client.finished.finish_reason, client.finished.stop_string, client.finished.stop_token_id) == (
        whole.finished.finish_reason,
        whole.finished.stop_string,
        whole.finished.stop_token_id,
    )
    assert client.finished.usage == whole.finished.usage


@settings(max_examples=200, deadline=None)
@given(output=outputs(), one=SIZES, other=SIZES)
def test_the_text_after_some_tokens_does_not_depend_on_how_they_came(
    output: Output, one: list[int], other: list[int]
) -> None:
    def texts(sizes: list[int]) -> dict[int, str]:
        client, after = Client(), dict[int, str]()
        for event in output.serve(output.run(), 0, sizes):
            client.take([event])
            if isinstance(event, Chunk) and event.token_ids:
                after[len(client.token_ids)] = client.text
        return after

    first, second = texts(one), texts(other)
    assert all(first[number] == second[number] for number in first.keys() & second.keys())


def test_text_held_until_the_end_comes_once_whether_or_not_its_chunk_had_arrived() -> None:
    output = Output(tokens=tuple(token_ids(BYTE_LEVEL, "abST")), stopping=Stopping(stop_strings=("STOP",)))
    events = output.serve(output.run(), 0, ())
    assert [event.text for event in events if isinstance(event, Chunk)] == ["ab", "ST"]

    for num_received in (2, 3):
        client = Client()
        client.take(events[:num_received])
        client.take(rest_of(output, client.resume()))
        assert (client.text, client.finished) == ("abST", events[-1])


def test_an_output_that_had_ended_is_answered_without_an_engine() -> None:
    output = Output(tokens=tuple(token_ids(BYTE_LEVEL, "hello")), stop_token_ids=frozenset())
    client = Client()
    client.take(output.serve(output.run(), 0, ())[:-1])
    run = output.run(client.resume())

    started, finished = asyncio.run(run.replay(client.resume()))

    assert isinstance(started, Started)
    assert (started.engine_id, started.resume_token) == ("", "token")
    assert isinstance(finished, Finished)
    assert finished.finish_reason is FinishReason.LENGTH
    assert run.is_finished


@pytest.mark.parametrize(
    ("ids", "num_text_bytes", "cause"),
    [("hello", 4, "text"), ("hello", 6, "text"), ("heSTOPx", None, "token_ids"), ("heSTOP", 3, "text")],
)
def test_what_cannot_be_of_this_output_is_refused(ids: str, num_text_bytes: int | None, cause: str) -> None:
    output = Output(tokens=tuple(range(10, 30)), stopping=Stopping(stop_strings=("STOP",), max_new_tokens=20))
    tokens = tuple(token_ids(BYTE_LEVEL, ids))
    resume = Resume(token="t", last_sequence=0, token_ids=tokens, num_text_bytes=num_text_bytes)

    with pytest.raises(ResumeInvalidError) as caught:
        asyncio.run(output.run(resume).replay(resume))

    assert caught.value.metadata == {"cause": cause}


async def test_a_long_output_is_gone_through_in_pieces_between_which_others_run() -> None:
    num_pieces = 20
    tokens = tuple(10 + n % 60 for n in range(num_pieces * REPLAY_TOKENS))
    output = Output(tokens=tokens, stopping=Stopping(max_new_tokens=len(tokens) + 1))
    resume = Resume(token="t", last_sequence=0, token_ids=tokens)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(count())
    await output.run(resume).replay(resume)
    other.cancel()

    assert turns >= num_pieces
