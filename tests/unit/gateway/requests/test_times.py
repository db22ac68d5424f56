"""Each instant of a request is taken once, and the log and the timings of its end agree on it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from loraplex_gateway.engines.ticket import EngineUpdate
from loraplex_gateway.engines.wire import EngineFinish, EngineStart
from loraplex_gateway.requests.prepared import PreparedRequest
from loraplex_gateway.requests.run import RequestRun
from loraplex_gateway.requests.times import RequestTimes
from loraplex_gateway.text.token_table import TokenTable
from loraplex_gateway.types import (
    Finished,
    FinishReason,
    GenerationRequest,
    Priority,
    ResponseOptions,
    Sampling,
    TextPrompt,
    Timings,
)
from support.tokenizers_for_tests import byte_level_tokenizer

TABLE = TokenTable(byte_level_tokenizer())
STARTED = EngineStart(cached_tokens=0, queue_s=0.25, adapter_load_s=0.0, prompt_logprobs=())


class Clock:
    """Seconds that pass only as they are set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def run_of(times: RequestTimes, *, time_limit_s: float | None = None) -> RequestRun:
    request = GenerationRequest(
        prompt=TextPrompt(text="hi"), options=ResponseOptions(token_ids=False), time_limit_s=time_limit_s
    )
    prepared = PreparedRequest(
        request=request,
        model=cast("Any", SimpleNamespace(tokenizer=SimpleNamespace(table=TABLE), fingerprint="f")),
        adapters=(),
        prompt_ids=(5,),
        sampling=Sampling(seed=7),
        stop_token_ids=frozenset(),
        max_new_tokens=8,
        priority=Priority.NORMAL,
        fairness_key="",
        cache_salt="",
        affinity_key="",
        deadline=60.0,
        queue_deadline=None,
    )
    return RequestRun(prepared, times)


def test_the_first_token_is_timed_when_it_comes_though_its_text_is_held_back() -> None:
    clock = Clock()
    times = RequestTimes(clock)
    run = run_of(times)
    half, other_half = TABLE.tokenizer.encode("ü", add_special_tokens=False).ids

    clock.now = 1.0
    assert run.events("e", EngineUpdate(token_ids=[half]))[1:] == []  # after `Started`, nothing to show yet
    clock.now = 2.0
    run.events("e", EngineUpdate(token_ids=[other_half]))

    assert (times.arrived_at, times.first_token_at, times.last_token_at) == (0.0, 1.0, 2.0)


def test_waiting_here_and_on_the_engine_is_queueing_and_preparing_the_prompt_is_not() -> None:
    clock = Clock()
    times = RequestTimes(clock)
    clock.now = 1.0  # the prompt was tokenized meanwhile
    times.queued()
    run = run_of(times)
    clock.now = 3.0
    run.admitted()
    clock.now = 4.0
    run.events("e", EngineUpdate(started=STARTED))
    clock.now = 5.0
    end = EngineFinish(reason=FinishReason.LENGTH, stop_token_id=None, timings=Timings())

    finished = run.events("e", EngineUpdate(token_ids=[65], end=end))[-1]

    assert isinstance(finished, Finished)
    assert finished.timings == Timings(queue_s=2.25, adapter_load_s=0.0, prefill_s=1.0, decode_s=0.0)


def test_the_time_limit_begins_when_the_request_is_admitted() -> None:
    clock = Clock()
    run = run_of(RequestTimes(clock), time_limit_s=10.0)
    assert run.time_limit_at is None

    clock.now = 3.0
    run.admitted()

    assert run.time_limit_at == 13.0
