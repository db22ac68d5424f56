from __future__ import annotations

import numpy as np
import pytest
from loraplex_common.errors import RequestTooLargeError
from loraplex_engine.loop.totals import LoopTotals
from loraplex_engine.messages import (
    Ended,
    FinishReason,
    ResidencyChanged,
    ResidencyState,
    SessionEvent,
    Started,
    StepOutputs,
)
from loraplex_engine.metrics.histogram import ArrayHistogram
from loraplex_engine.metrics.prefetch import PrefetchMetrics
from loraplex_engine.metrics.requests import RequestMetrics
from loraplex_engine.metrics.residency import ResidencyMetrics
from prometheus_client import CollectorRegistry, generate_latest


def make_step(*events: SessionEvent, slots: tuple[int, ...] = ()) -> StepOutputs:
    tokens = np.array(slots, dtype=np.int32)
    return StepOutputs(step_id=1, token_slots=tokens, token_positions=tokens, token_ids=tokens, events=list(events))


def sample(registry: CollectorRegistry, name: str, **labels: str) -> float:
    value = registry.get_sample_value(name, labels)
    assert value is not None, f"{name} is not in\n{generate_latest(registry).decode()}"
    return value


def test_an_array_is_counted_like_its_values() -> None:
    registry = CollectorRegistry()
    histogram = ArrayHistogram("h", "help", (1.0, 2.0), registry)

    histogram.observe(np.array([0.5, 1.0, 1.5, 3.0]))
    histogram.observe(2.0)
    histogram.observe(np.empty(0))

    assert [sample(registry, "h_bucket", le=le) for le in ("1.0", "2.0", "+Inf")] == [2, 4, 5]
    assert sample(registry, "h_sum") == 8.0
    assert sample(registry, "h_count") == 5


def test_a_request_is_timed_from_arrival_over_first_token_to_end() -> None:
    registry = CollectorRegistry()
    meter = RequestMetrics(registry).open_session()

    meter.submitted(1, 10, 100.0)
    meter.record(make_step(Started(session_slot=1, cached_tokens=0, queue_s=0, adapter_load_s=0)), 100.5)
    meter.record(make_step(slots=(1,)), 101.0)
    meter.record(make_step(slots=(1, 1)), 101.5)
    end = Ended(session_slot=1, finish_reason=FinishReason.LENGTH, queue_s=0.5, prefill_s=0.5, decode_s=0.5)
    meter.record(make_step(end), 102.0)

    assert sample(registry, "vllm:time_to_first_token_seconds_sum") == 1.0
    assert sample(registry, "vllm:inter_token_latency_seconds_count") == 2
    assert sample(registry, "vllm:inter_token_latency_seconds_sum") == 0.5
    assert sample(registry, "vllm:e2e_request_latency_seconds_sum") == 2.0
    assert sample(registry, "vllm:request_queue_time_seconds_sum") == 0.5
    assert sample(registry, "vllm:prompt_tokens_total") == 10
    assert sample(registry, "vllm:generation_tokens_total") == 3
    assert sample(registry, "vllm:request_success_total", finished_reason="length") == 1


def test_a_finished_request_is_counted_in_every_histogram_of_vllm() -> None:
    registry = CollectorRegistry()
    meter = RequestMetrics(registry).open_session()

    meter.submitted(1, 10, 100.0, 50)
    meter.record(
        make_step(Started(session_slot=1, cached_tokens=4, queue_s=0, adapter_load_s=0), slots=(1, 1, 1)), 101.0
    )
    end = Ended(session_slot=1, finish_reason=FinishReason.STOP, queue_s=0.5, prefill_s=0.25, decode_s=0.5)
    meter.record(make_step(end), 102.0)

    for name, value in {
        "request_prompt_tokens": 10,
        "request_prefill_kv_computed_tokens": 6,
        "request_generation_tokens": 3,
        "request_max_num_generation_tokens": 3,
        "request_params_max_tokens": 50,
        "request_inference_time_seconds": 0.75,
        "request_time_per_output_token_seconds": 0.25,
    }.items():
        assert (sample(registry, f"vllm:{name}_sum"), sample(registry, f"vllm:{name}_count")) == (value, 1)
    assert sample(registry, "vllm:prompt_tokens_cached_total") == 4


@pytest.mark.parametrize(("num_tokens", "bound"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, 16), (65536, 65536)])
def test_a_step_is_counted_below_the_smallest_bound_that_holds_it(num_tokens: int, bound: int) -> None:
    totals = LoopTotals()

    totals.add_step(num_tokens)

    assert totals.step_sizes.index(1) == bound.bit_length() - 1
    assert (totals.num_steps, totals.num_tokens) == (1, num_tokens)


def test_the_first_token_and_more_in_one_message_count_once_as_first() -> None:
    registry = CollectorRegistry()
    meter = RequestMetrics(registry).open_session()
    meter.submitted(1, 1, 0.0)

    meter.record(make_step(slots=(1, 1, 1)), 2.0)

    assert sample(registry, "vllm:time_to_first_token_seconds_count") == 1
    assert sample(registry, "vllm:inter_token_latency_seconds_count") == 2


@pytest.mark.parametrize("has_started", [True, False])
def test_a_failed_request_counts_by_its_reason(has_started: bool) -> None:
    registry = CollectorRegistry()
    meter = RequestMetrics(registry).open_session()
    if has_started:
        meter.submitted(1, 1, 0.0)

    meter.record(make_step(Ended(session_slot=1, error=RequestTooLargeError("x"))), 1.0)

    assert sample(registry, "loraplex_engine_request_errors_total", reason="REQUEST_TOO_LARGE") == 1


def test_requests_of_a_lost_session_count_as_aborted() -> None:
    registry = CollectorRegistry()
    meter = RequestMetrics(registry).open_session()
    meter.submitted(1, 1, 0.0)

    meter.close()

    assert sample(registry, "vllm:request_success_total", finished_reason="abort") == 1


def changed(state: ResidencyState, *, sequence: int = 0, num_leases: int = 0) -> ResidencyChanged:
    return ResidencyChanged(
        sequence=sequence,
        digest="d",
        state=state,
        generation=1,
        num_leases=num_leases,
        num_pages=3,
        is_pinned=False,
        max_rank=8,
    )


def move(metrics: ResidencyMetrics, *states: ResidencyState) -> None:
    for moment, state in enumerate(states):
        metrics.changed(changed(state, sequence=moment), float(moment))


def test_an_adapters_way_to_the_device_is_timed_by_stage() -> None:
    registry = CollectorRegistry()
    state = ResidencyState

    move(ResidencyMetrics(registry), state.WANTED, state.IN_ARENA, state.LOADING, state.RESIDENT)

    assert sample(registry, "loraplex_engine_adapter_load_seconds_sum", stage="store") == 1.0
    assert sample(registry, "loraplex_engine_adapter_load_seconds_sum", stage="copy") == 1.0
    assert sample(registry, "vllm:lora_adapter_load_seconds_sum") == 3.0
    assert sample(registry, "loraplex_engine_adapter_loads_total", outcome="loaded") == 1


def test_evictions_are_counted_by_cause() -> None:
    registry = CollectorRegistry()
    state = ResidencyState

    way = (state.IN_ARENA, state.LOADING, state.RESIDENT)
    move(ResidencyMetrics(registry), *way, *way, state.DRAINING, state.IN_ARENA, state.ABSENT)

    for cause in ("pressure", "request", "arena"):
        assert sample(registry, "loraplex_engine_adapter_evictions_total", cause=cause) == 1


def test_a_refused_adapter_counts_as_refused() -> None:
    registry = CollectorRegistry()

    move(ResidencyMetrics(registry), ResidencyState.WANTED, ResidencyState.ABSENT)

    assert sample(registry, "loraplex_engine_adapter_loads_total", outcome="refused") == 1


@pytest.mark.parametrize(
    ("story", "useful", "late", "wasted"),
    [
        ("IN_ARENA LOADING RESIDENT leased RESIDENT IN_ARENA ABSENT", 300, 0, 0),
        ("IN_ARENA ABSENT", 0, 0, 300),
        ("IN_ARENA LOADING RESIDENT IN_ARENA ABSENT", 0, 0, 300),
        ("prefetching IN_ARENA LOADING RESIDENT leased ABSENT", 0, 300, 0),
        ("WANTED IN_ARENA LOADING RESIDENT leased ABSENT", 0, 0, 0),
    ],
)
def test_what_became_of_a_prefetched_image_is_counted_in_bytes(story: str, useful: int, late: int, wasted: int) -> None:
    registry = CollectorRegistry()
    metrics = PrefetchMetrics(registry, page_bytes=100)

    for word in story.split():
        state = {"leased": ResidencyState.RESIDENT, "prefetching": ResidencyState.WANTED}.get(word)
        event = changed(state or ResidencyState[word], num_leases=word == "leased")
        metrics.changed(event, is_under_way=word == "prefetching")

    for result, expected in (("useful", useful), ("late", late), ("wasted", wasted)):
        assert sample(registry, "loraplex_engine_prefetch_bytes_total", result=result) == expected
