"""Every bad field is named, with what it is and what it may be."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from loraplex.v1 import gateway_pb2
from loraplex_common.error_status import to_status
from loraplex_common.errors import ContextLengthError, InvalidParameterError
from loraplex_common.request_limits import MAX_MESSAGES
from loraplex_gateway.grpc import wire
from loraplex_gateway.requests.lengths import check_length, check_prompt_logprobs
from loraplex_gateway.requests.validation import (
    check_drawable,
    check_request,
    check_token_ids,
)
from loraplex_gateway.text.token_ids import TokenIds
from loraplex_gateway.types import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    ResponseOptions,
    Sampling,
    Stopping,
    TextPrompt,
    TokenPrompt,
    WeightedAdapter,
)

REQUEST = GenerationRequest(prompt=TextPrompt(text="hi"))


def violated(request: GenerationRequest) -> list[str]:
    try:
        check_request(request)
    except InvalidParameterError as error:
        return [field for field, _ in error.violations]
    return []


@pytest.mark.parametrize(
    ("field", "bad", "good"),
    [
        ("temperature", [-0.1, 100.5, math.nan, math.inf], [0, 0.7, 100]),
        ("top_k", [-2, 2**40, 10**400], [-1, 0, 50]),
        ("top_p", [-0.1, 1.01, math.nan, 10**400], [0, 0.01, 1.0]),
        ("min_p", [-0.1, 1.1], [0.0, 1.0]),
        ("seed", [-1, 2**64], [0, 2**64 - 1]),
        ("repetition_penalty", [0.0, 10.1, 1e-60], [0.1, 10.0]),
        ("presence_penalty", [-2.1, 2.1], [-2.0, 2.0]),
        ("frequency_penalty", [-2.1, 2.1, math.nan], [-2.0, 2.0]),
        ("logit_bias", [{1: 101.0}, {1: math.nan}, {n: 0.0 for n in range(1025)}], [{1: -100.0}]),
        ("allowed_token_ids", [tuple(range(1025))], [(1, 2)]),
    ],
)
def test_sampling_ranges(field: str, bad: list[Any], good: list[Any]) -> None:
    for value in bad:
        assert violated(replace(REQUEST, sampling=Sampling(**{field: value}))) == [f"sampling.{field}"], value
    for value in good:
        assert violated(replace(REQUEST, sampling=Sampling(**{field: value}))) == [], value


@pytest.mark.parametrize(
    ("stopping", "fields"),
    [
        (Stopping(max_new_tokens=-1), ["stopping.max_new_tokens"]),
        (Stopping(max_new_tokens=2, min_new_tokens=3), ["stopping.min_new_tokens"]),
        (Stopping(stop_strings=("",)), ["stopping.stop_strings[0]"]),
        (Stopping(stop_strings=("ok", "x" * 257)), ["stopping.stop_strings[1]"]),
        (Stopping(stop_strings=("x",) * 17), ["stopping.stop_strings"]),
        (Stopping(stop_token_ids=(1,) * 65), ["stopping.stop_token_ids"]),
        (Stopping(stop_strings=("\ud800",)), ["stopping.stop_strings[0]"]),
    ],
)
def test_stopping_rules(stopping: Stopping, fields: list[str]) -> None:
    assert violated(replace(REQUEST, stopping=stopping)) == fields


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": TextPrompt(text="")}, "text"),
        ({"prompt": TextPrompt(text="a\udcffb")}, "text"),
        ({"prompt": TokenPrompt(ids=())}, "token_ids"),
        ({"prompt": ChatPrompt(messages=())}, "messages"),
        ({"prompt": ChatPrompt(messages=(ChatMessage(role="", content="x"),))}, "messages[0].role"),
        ({"prompt": ChatPrompt(messages=(ChatMessage(role="user", content="\ud800"),))}, "messages[0].content"),
        ({"request_id": "no spaces please"}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"adapter": "x" * 10**6}, "adapter"),
        ({"model": "x" * 10**6}, "model"),
        ({"affinity_key": "x" * 257}, "affinity_key"),
        ({"adapter": "a", "adapter_scale": -1.0}, "adapter_scale"),
        ({"adapter_scale": 0.5}, "adapter_scale"),
        ({"queue_timeout_s": 0.0}, "queue_timeout"),
        ({"time_limit_s": -1.0}, "time_limit"),
        ({"options": ResponseOptions(logprobs=21)}, "response_options.logprobs"),
        ({"options": ResponseOptions(prompt_logprobs=21)}, "response_options.prompt_logprobs"),
        ({"sampling": Sampling(bad_words=("ok", ""))}, "sampling.bad_words[1]"),
        ({"sampling": Sampling(bad_words=("x" * 257,))}, "sampling.bad_words[0]"),
        ({"sampling": Sampling(bad_words=("x",) * 65)}, "sampling.bad_words"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ],
)
def test_other_rules(changes: dict[str, Any], field: str) -> None:
    assert violated(replace(REQUEST, **changes)) == [field]


def test_a_sound_request_passes() -> None:
    check_request(replace(REQUEST, request_id="0b0e7a4e-6ad1-4dc4-8c4e-2f6f3f2a8a11"))


def test_all_bad_fields_are_named_at_once_on_the_wire() -> None:
    request = GenerationRequest(prompt=None, sampling=Sampling(temperature=-1.0, top_p=2.0))

    with pytest.raises(InvalidParameterError) as caught:
        check_request(request)

    fields = ["sampling.temperature", "sampling.top_p", "prompt"]
    assert [field for field, _ in caught.value.violations] == fields
    assert b"sampling.top_p" in to_status(caught.value).SerializeToString()
    assert "sampling.temperature is -1; it must be in [0, 100]" in caught.value.message


@pytest.mark.parametrize(
    ("weight", "shown"),
    [(100.0001, "100.0001"), (100.00000762939453, "100.000008"), (-0.10000000149011612, "-0.1"), (1e308, "1e+308")],
)
def test_a_weight_is_shown_so_that_it_differs_from_its_limit(weight: float, shown: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        check_request(replace(REQUEST, adapters=(WeightedAdapter(name="poet", weight=weight),)))

    assert caught.value.message == f"adapters[0].weight is {shown}; it must be in [0, 100]"


def test_token_ids_beyond_the_vocabulary_are_named() -> None:
    request = replace(REQUEST, sampling=Sampling(logit_bias={500: 1.0}), stopping=Stopping(stop_token_ids=(384,)))

    with pytest.raises(InvalidParameterError) as caught:
        check_token_ids(request, (1, 400), TokenIds(384))

    assert [field for field, _ in caught.value.violations] == [
        "token_ids",
        "sampling.logit_bias",
        "stopping.stop_token_ids",
    ]
    assert "400" in caught.value.message


def test_a_request_that_leaves_no_token_to_draw_is_refused() -> None:
    request = replace(REQUEST, sampling=Sampling(allowed_token_ids=(2, 7)), stopping=Stopping(min_new_tokens=4))

    check_drawable(request, {2}, 384)
    check_drawable(replace(request, stopping=Stopping(min_new_tokens=0)), {2, 7}, 384)
    check_drawable(replace(request, stopping=Stopping(min_new_tokens=4, ignore_eos=True)), {2, 7}, 384)
    check_drawable(replace(request, sampling=Sampling()), {2, 7}, 384)
    with pytest.raises(InvalidParameterError, match="allowed_token_ids"):
        check_drawable(request, {2, 7, 9}, 384)


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="no token"):
        check_token_ids(REQUEST, (), TokenIds(384))


@pytest.mark.parametrize(
    ("prompt", "output", "field", "sums"),
    [
        (600, None, "prompt", "requested 1 output tokens .* 600 input tokens, for a total of 601 tokens; shorten"),
        (512, None, "prompt", "total of 513"),
        (512, 0, "prompt", "requested 0 output tokens .* total of 513 tokens; shorten"),
        (500, 13, "stopping.max_new_tokens", "total of 513 tokens; ask for at most 12 output tokens or shorten"),
        (500, 2**31 - 1, "stopping.max_new_tokens", "at most 12"),
    ],
)
def test_more_tokens_than_a_sequence_can_have_are_refused_with_the_arithmetic(
    prompt: int, output: int | None, field: str, sums: str
) -> None:
    with pytest.raises(ContextLengthError, match=f"maximum context length is 512 tokens.*{sums}") as caught:
        check_length(prompt, output, 512)

    assert caught.value.field == field


def test_a_sequence_may_be_filled_to_the_last_token() -> None:
    check_length(511, None, 512)
    check_length(511, 0, 512)
    check_length(500, 12, 512)


def test_a_status_stays_small_however_much_is_wrong() -> None:
    messages = tuple(ChatMessage(role="", content="\ud800") for _ in range(10_000))

    with pytest.raises(InvalidParameterError, match="and 19992 more") as caught:
        check_request(GenerationRequest(prompt=ChatPrompt(messages=messages)))

    assert len(to_status(caught.value).SerializeToString()) < 4096


def test_probabilities_of_a_prompt_must_fit_one_message() -> None:
    check_prompt_logprobs(100_000, 0)
    check_prompt_logprobs(10**9, None)

    with pytest.raises(InvalidParameterError, match=r"5000 tokens x \(1 drawn \+ 20 likeliest\)") as caught:
        check_prompt_logprobs(5_000, 20)

    assert caught.value.field == "response_options.prompt_logprobs"


def test_a_conversation_of_too_many_turns_is_refused_before_it_is_looked_at() -> None:
    turn = gateway_pb2.ChatMessage(role="u")
    chat = gateway_pb2.ChatMessages(messages=[turn] * (MAX_MESSAGES + 1))

    with pytest.raises(InvalidParameterError, match="16385 entries; at most 16384"):
        wire.prompt(gateway_pb2.GenerateRequest(messages=chat))
