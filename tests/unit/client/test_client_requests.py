"""Keyword arguments become the wire's fields, or a named error."""

from __future__ import annotations

import inspect
import json
import uuid
from typing import TYPE_CHECKING, Any, cast

import pytest
from google.protobuf.json_format import MessageToDict
from loraplex_client import Adapters, AsyncAdapters, AsyncClient, Client, GenerateOptions
from loraplex_client._requests import generate_request, tokenize_request
from loraplex_common.errors import InvalidParameterError

if TYPE_CHECKING:
    from loraplex.v1 import gateway_pb2


def request(**options: Any) -> dict[str, Any]:
    built = MessageToDict(
        generate_request(cast("GenerateOptions", {"request_id": "r", **options})), preserving_proto_field_name=True
    )
    assert built.pop("request_id") == "r"
    return built


def test_every_option_reaches_its_field() -> None:
    built = request(
        prompt="hi",
        adapter="json:prod",
        adapter_scale=0.5,
        max_new_tokens=8,
        min_new_tokens=2,
        stop=["a", "b"],
        stop_token_ids=[5],
        ignore_eos=True,
        include_stop=True,
        temperature=0.25,
        top_k=4,
        top_p=0.5,
        min_p=0.125,
        seed=2**63,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={3: -100.0},
        allowed_token_ids=[3, 4],
        bad_words="never",
        structured_output={"regex": "a+"},
        truncate_prompt_tokens=-1,
        logprobs=0,
        prompt_logprobs=2,
        skip_special_tokens=False,
        priority="high",
        queue_timeout_s=1.5,
        time_limit_s=30,
        cache_salt="salt",
        affinity_key="user",
        load_policy="fail_fast",
        progress_events=True,
        model="base",
        timeout=5,
    )

    assert built == {
        "text": "hi",
        "adapter": "json:prod",
        "adapter_scale": 0.5,
        "model": "base",
        "sampling": {
            "temperature": 0.25,
            "top_k": 4,
            "top_p": 0.5,
            "min_p": 0.125,
            "seed": str(2**63),
            "repetition_penalty": 1.5,
            "presence_penalty": 0.5,
            "frequency_penalty": -0.5,
            "logit_bias": {"3": -100.0},
            "allowed_token_ids": [3, 4],
            "bad_words": ["never"],
        },
        "structured_output": {"regex": "a+"},
        "truncate_prompt_tokens": -1,
        "stopping": {
            "max_new_tokens": 8,
            "min_new_tokens": 2,
            "stop_strings": ["a", "b"],
            "stop_token_ids": [5],
            "ignore_eos": True,
            "include_stop": True,
        },
        "response_options": {"logprobs": 0, "prompt_logprobs": 2, "skip_special_tokens": False},
        "priority": "PRIORITY_HIGH",
        "queue_timeout": "1.500s",
        "time_limit": "30s",
        "cache_salt": "salt",
        "affinity_key": "user",
        "load_policy": "LOAD_POLICY_FAIL_FAST",
        "progress_events": True,
    }


def test_several_adapters_are_pairs_of_name_and_weight() -> None:
    built = request(prompt="hi", adapters=[("poet", 0.5), ("json:prod", 1)])

    assert built["adapters"] == [{"name": "poet", "weight": 0.5}, {"name": "json:prod", "weight": 1.0}]


def test_an_iterator_of_adapters_is_read_whole() -> None:
    names, weights = ("poet", "json:prod"), (0.5, 1.0)

    built = request(prompt="hi", adapters=zip(names, weights, strict=True))

    assert built["adapters"] == [{"name": "poet", "weight": 0.5}, {"name": "json:prod", "weight": 1.0}]
    assert len(tokenize(prompt="hi", adapters=zip(names, weights, strict=True)).adapters) == 2


@pytest.mark.parametrize("bad", ["poet", [("poet",)], [("poet", "0.5")], [("poet", 10**400)]])
def test_adapters_that_are_no_pairs_are_refused_by_name_where_tokens_are_counted(bad: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        tokenize(prompt="hi", adapters=bad)

    assert caught.value.field == "adapters"


@pytest.mark.parametrize("bad", ["poet", ["poet", "ab"], [("poet",)], [("poet", "0.5")], [(1, 0.5)], [None], 1])
def test_adapters_that_are_no_pairs_are_refused_by_name(bad: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        request(prompt="hi", adapters=bad)

    assert caught.value.field == "adapters"


def test_every_documented_option_is_served() -> None:
    values: dict[str, Any] = {"stop": "x", "priority": "batch", "load_policy": "wait", "logit_bias": {1: 1.0}}
    values |= {"bad_words": "x", "structured_output": {"json_object": True}, "adapters": [("x", 1.0)]}
    flags = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")
    prompts = ("prompt", "prompt_token_ids", "messages", *flags)
    texts = ("model", "adapter", "cache_salt", "affinity_key", "request_id")

    for name in GenerateOptions.__annotations__:
        if name not in prompts:
            value = values.get(name, "x" if name in texts else [1] if name.endswith("_ids") else 1)
            generate_request(cast("GenerateOptions", {"prompt": "hi", name: value}))


@pytest.mark.parametrize(
    ("wanted", "sent"),
    [
        ({"json_object": True}, {"json_object": True}),
        ({"json_schema": {"type": "null"}}, {"json_schema": '{"type": "null"}'}),
        ({"json_schema": "{}"}, {"json_schema": "{}"}),
        ({"choice": ["a", "b"]}, {"choice": {"choices": ["a", "b"]}}),
        ({"structural_tag": {"format": {}}}, {"structural_tag": '{"format": {}}'}),
    ],
)
def test_a_structure_may_be_sent_as_json_or_as_its_text(wanted: dict[str, Any], sent: dict[str, Any]) -> None:
    assert request(prompt="hi", structured_output=wanted)["structured_output"] == sent


@pytest.mark.parametrize(
    "wanted", [{}, {"regex": "a", "choice": ["b"]}, {"jason": {}}, {"json_schema": float("nan")}, "json", {"choice": 5}]
)
def test_a_structure_that_is_none_is_named(wanted: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        request(prompt="hi", structured_output=wanted)

    assert caught.value.field == "structured_output"


def test_options_that_are_none_are_left_to_the_server() -> None:
    assert request(prompt="hi", temperature=None, adapter=None, stop=None) == {"text": "hi"}


def test_one_stop_string_may_come_without_a_list() -> None:
    assert request(prompt="hi", stop="END")["stopping"] == {"stop_strings": ["END"]}


def test_messages_carry_their_template_flags() -> None:
    built = request(messages=[{"role": "user", "content": "hi", "name": "Ada"}], add_generation_prompt=False)

    message = {"role": "user", "content": "hi", "name": "Ada"}
    assert built == {"messages": {"messages": [message], "add_generation_prompt": False}}


def test_template_variables_travel_as_json() -> None:
    variables = {"enable_thinking": False, "effort": "low", "budget": 2**60, "weight": 1.0, "tags": ["a", None]}
    texts = {
        "enable_thinking": "false",
        "effort": '"low"',
        "budget": str(2**60),
        "weight": "1.0",
        "tags": '["a", null]',
    }
    messages = [{"role": "user", "content": "hi"}]

    assert request(messages=messages, chat_template_kwargs=variables)["messages"]["chat_template_kwargs"] == texts
    tokenized = tokenize(messages=messages, chat_template_kwargs=variables)
    assert dict(tokenized.messages.chat_template_kwargs) == texts


@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}, b"bytes"])
def test_a_template_variable_that_is_no_json_is_refused_by_name(value: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        request(messages=[], chat_template_kwargs={"x": value})
    assert caught.value.field == "chat_template_kwargs.x"


def test_functions_and_calls_travel_in_openais_shape() -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": {"zone": "\u4f60"}}}
    turns: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "noon", "tool_call_id": "c1"},
    ]

    built = tokenize(messages=turns, tools=[tool, tool["function"]]).messages

    assert [json.loads(text) for text in built.tools] == [tool["function"]] * 2
    assistant, answer = built.messages
    assert (assistant.content, assistant.reasoning, assistant.tool_calls[0].id) == ("", "hm", "c1")
    assert json.loads(assistant.tool_calls[0].arguments) == {"zone": "\u4f60"}
    assert (answer.role, answer.tool_call_id) == ("tool", "c1")
    assert request(messages=turns, tools=[tool])["messages"]["tools"] == [json.dumps(tool["function"])]


@pytest.mark.parametrize(
    ("turn", "field"),
    [
        ({"role": "assistant", "tool_calls": [{"id": "c"}]}, "messages[0].tool_calls[0]"),
        ({"role": "assistant", "content": None}, "messages"),
        ({"role": "user", "content": "hi", "weight": "1"}, "messages"),
    ],
)
def test_a_turn_that_says_nothing_or_too_much_is_refused(turn: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        request(messages=[turn])
    assert caught.value.field == field


def test_template_variables_go_with_messages_only() -> None:
    for build in (
        lambda: request(prompt="hi", chat_template_kwargs={}),
        lambda: tokenize(prompt="hi", chat_template_kwargs={}),
    ):
        with pytest.raises(InvalidParameterError, match="goes with messages only"):
            build()


def test_an_empty_prompt_is_sent_for_the_gateway_to_refuse() -> None:
    assert generate_request({"prompt": ""}).WhichOneof("prompt") == "text"
    assert generate_request({"prompt_token_ids": []}).WhichOneof("prompt") == "token_ids"


def test_a_request_id_is_drawn_if_none_is_given() -> None:
    first, second = (generate_request({"prompt": "hi"}).request_id for _ in range(2))

    assert uuid.UUID(first).version == 4
    assert first != second


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt": "hi", "prompt_token_ids": [1]},
        {"messages": [], "prompt": "hi"},
        {"prompt": "hi", "add_generation_prompt": True},
    ],
)
def test_not_exactly_one_prompt_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameterError):
        request(**options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("max_new_tokens", -1),
        ("top_k", 2**40),
        ("stop_token_ids", [-1]),
        ("logit_bias", {-1: 1.0}),
        ("priority", "urgent"),
        ("load_policy", "never"),
    ],
)
def test_a_value_that_does_not_fit_its_field_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidParameterError, match=name) as raised:
        request(prompt="hi", **{name: value})

    assert raised.value.field == name


def test_token_ids_that_are_none_are_refused() -> None:
    with pytest.raises(InvalidParameterError, match="prompt_token_ids"):
        request(prompt_token_ids=[-5])


@pytest.mark.parametrize("value", [1, None])
def test_an_unknown_option_is_a_programming_error_whatever_its_value(value: Any) -> None:
    with pytest.raises(TypeError, match="temprature"):
        request(prompt="hi", temprature=value)


@pytest.mark.parametrize("cls", [Client, AsyncClient, Adapters, AsyncAdapters], ids=lambda cls: cls.__name__)
def test_no_call_takes_options_that_it_does_not_know(cls: type) -> None:
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        kinds = {parameter.kind for parameter in inspect.signature(method).parameters.values()}
        if name.startswith("_") or inspect.Parameter.VAR_KEYWORD not in kinds:
            continue
        # A dictionary of options goes through the one check of generate_request.
        assert name in ("generate", "generate_once")


@pytest.mark.parametrize("value", ["many", [1], {"a": 1}, object()])
def test_a_value_of_another_type_is_named(value: Any) -> None:
    for name in ("max_new_tokens", "temperature", "logit_bias", "queue_timeout_s", "priority"):
        with pytest.raises(InvalidParameterError, match=name) as raised:
            request(prompt="hi", **{name: value if name != "logit_bias" or value != {"a": 1} else [1]})

        assert raised.value.field == name


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "x", "function_call": {"name": "f"}},
        {"role": "assistant", "content": "x", "tool_calls": [{"id": "c1", "type": "custom"}]},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        "user: hi",
    ],
)
def test_no_part_of_a_message_is_dropped(message: Any) -> None:
    with pytest.raises(InvalidParameterError, match="messages"):
        request(messages=[message])


def tokenize(**options: Any) -> gateway_pb2.TokenizeRequest:
    every = inspect.signature(tokenize_request).parameters
    return tokenize_request(**{**dict.fromkeys(every), **options})


def test_tokenize_wants_text_or_messages() -> None:
    assert tokenize(prompt="hi", add_special_tokens=False).add_special_tokens is False
    assert not tokenize(prompt="hi").HasField("add_special_tokens")
    for prompts in ({}, {"prompt": "hi", "messages": []}):
        with pytest.raises(InvalidParameterError, match="exactly one of prompt, messages"):
            tokenize(**prompts)


def test_tokenize_renders_messages_as_generate_does() -> None:
    flags = {"add_generation_prompt": False, "continue_final_message": True}
    messages = [{"role": "user", "content": "hi"}]

    built = tokenize(messages=messages, **flags)

    assert built.messages == generate_request({"messages": messages, **flags}).messages  # type: ignore[typeddict-item]
    with pytest.raises(InvalidParameterError, match="goes with messages only"):
        tokenize(prompt="hi", add_generation_prompt=True)


def test_what_tokenize_does_not_know_is_a_programming_error() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(TypeError, match="prompt_token_ids"):
        client.tokenize(prompt="hi", prompt_token_ids=[1])  # type: ignore[call-arg]
