"""Gateway and engine take the same numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from loraplex.v1 import engine_pb2, gateway_pb2
from loraplex_common.errors import InvalidParameterError
from loraplex_common.request_limits import MAX_ENTRIES, MAX_WAIT_S, RANGES
from loraplex_engine.rpc import validation as engine
from loraplex_gateway.requests import validation as gateway
from loraplex_gateway.types import GenerationRequest, ResponseOptions, Sampling, Stopping, TokenPrompt

if TYPE_CHECKING:
    from collections.abc import Callable

LIMITS = engine.RequestLimits(vocab_size=2000, max_model_len=512)
SAMPLING = {field.name for field in gateway_pb2.SamplingParams.DESCRIPTOR.fields}
STOPPING = {field.name for field in gateway_pb2.StoppingParams.DESCRIPTOR.fields}
WAITS = ("queue_timeout", "time_limit")  # reach the engine as what is left of them
FRACTIONS = {"temperature", "top_p", "min_p", "logit_bias", "adapter_scale"} | {
    name for name in RANGES if name.endswith("penalty")
}


def takes(name: str, check: Callable[[], object]) -> bool:
    """Return whether a check passes; what it refuses it must call by its name."""
    try:
        check()
    except (InvalidParameterError, ValueError) as error:  # ValueError: the message itself cannot hold the number
        refused = error.field if isinstance(error, InvalidParameterError) else name
        if refused is None or refused.rpartition(".")[2].partition("[")[0] != name:
            raise
        return False
    return True


def gateway_takes(name: str, value: Any) -> bool:
    request = GenerationRequest(
        prompt=TokenPrompt(ids=(1,)),
        adapter="a",
        sampling=Sampling(**{name: value} if name in SAMPLING else {}),
        stopping=Stopping(**{name: value} if name in STOPPING else {}),
        options=ResponseOptions(**{name: value} if "logprobs" in name else {}),
        adapter_scale=value if name == "adapter_scale" else None,
    )
    return takes(name, lambda: gateway.check_request(request))


def engine_takes(name: str, value: Any) -> bool:
    def check() -> None:
        if name == "adapter_scale":
            engine.check_range(value, name)
            return
        sampling: dict[str, Any] = {"seed": 1, **({name: value} if name in SAMPLING else {})}
        submit = engine_pb2.Submit(
            prompt_token_ids=[1],
            sampling=gateway_pb2.SamplingParams(**sampling),
            stopping=gateway_pb2.StoppingParams(**{name: value} if name in STOPPING else {}),
            **{name: value} if "logprobs" in name else {},
        )
        engine.check_sampling(submit, LIMITS)
        engine.check_stopping(submit, LIMITS)

    return takes(name, check)


def values_at_the_edges(name: str) -> list[tuple[Any, bool]]:
    """Return (value, whether it is right) at both ends of a range and just beyond."""
    limits, step = RANGES[name], 0.125 if name in FRACTIONS else 1
    found = [(limits.low, not limits.excludes_low), (limits.low + step, True), (limits.high, True)]
    found += [(limits.low - step, False), (limits.high + step, False)]
    return found + ([(math.nan, False), (math.inf, False), (-math.inf, False)] if name in FRACTIONS else [])


@pytest.mark.parametrize("name", [name for name in RANGES if name not in (*WAITS, "max_new_tokens")])
def test_both_take_a_range_to_its_ends_and_nothing_beyond(name: str) -> None:
    for number, is_right in values_at_the_edges(name):
        value = {1: number} if name == "logit_bias" else number
        assert (gateway_takes(name, value), engine_takes(name, value)) == (is_right, is_right), number


def test_no_new_tokens_are_the_gateways_business() -> None:
    assert [gateway_takes("max_new_tokens", value) for value in (-1, 0, 1, 2**31)] == [False, True, True, False]
    assert [engine_takes("max_new_tokens", value) for value in (0, 1, 2**31)] == [False, True, False]


@pytest.mark.parametrize("name", [name for name in MAX_ENTRIES if name not in ("stop_strings", "bad_words")])
def test_both_take_as_many_entries_and_no_more(name: str) -> None:
    for count, is_right in ((MAX_ENTRIES[name], True), (MAX_ENTRIES[name] + 1, False)):
        value: Any = dict.fromkeys(range(count), 0.0) if name == "logit_bias" else tuple(range(count))
        assert (gateway_takes(name, value), engine_takes(name, value)) == (is_right, is_right), count


def test_every_range_is_checked_by_the_gateway() -> None:
    checked = {rule.field.rpartition(".")[2] for rule in gateway.RANGES} | {"logit_bias"}

    assert checked == set(RANGES)
    assert RANGES["time_limit"].high == MAX_WAIT_S


def test_top_p_of_zero_keeps_the_likeliest_token() -> None:
    submit = engine_pb2.Submit(prompt_token_ids=[1], sampling=gateway_pb2.SamplingParams(seed=1, top_p=0.0))

    assert 0 < engine.check_sampling(submit, LIMITS).top_p < 1e-30
