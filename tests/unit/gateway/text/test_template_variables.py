"""What clients may hand to a chat template."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex_common.errors import InvalidParameterError
from loraplex_gateway.requests.validation import check_prompt
from loraplex_gateway.text.template_variables import FIELD, MAX_DEPTH, from_json
from loraplex_gateway.types import ChatMessage, ChatPrompt

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


def check(variables: dict[str, Any]) -> None:
    check_prompt(ChatPrompt(messages=(ChatMessage(role="user", content="x"),), template_kwargs=variables))


def field_refused(variables: dict[str, Any]) -> str | None:
    with pytest.raises(InvalidParameterError) as caught:
        check(variables)
    return caught.value.field


@given(value=JSON_VALUES)
def test_a_json_value_arrives_as_it_was_sent(value: Any) -> None:
    arrived = from_json({"name": json.dumps(value)})["name"]

    assert (arrived, type(arrived)) == (value, type(value))


@pytest.mark.parametrize(
    "variables",
    [{"enable_thinking": False}, {"thinking_budget": 512}, {"custom_instructions": {"a": [1, "b", None]}}, {}],
)
def test_the_variables_of_known_templates_are_taken(variables: dict[str, Any]) -> None:
    check(variables)


@pytest.mark.parametrize(
    "name",
    [
        *("messages", "add_generation_prompt", "continue_final_message", "tools", "documents", "chat_template"),
        *("bos_token", "eos_token", "pad_token", "raise_exception", "strftime_now", "range", "namespace", "loop"),
        *("tokenize", "a-b", "", "1"),
    ],
)
def test_a_name_with_another_meaning_is_refused_by_name(name: str) -> None:
    assert field_refused({name: True, "enable_thinking": True}) == f"{FIELD}.{name}"


def nested(depth: int) -> Any:
    value: Any = 1
    for n in range(depth):
        value = [value] if n % 2 else {"x": value}
    return value


def test_depth_is_bounded() -> None:
    check({"x": nested(MAX_DEPTH)})

    assert field_refused({"x": nested(MAX_DEPTH + 1)}) == f"{FIELD}.x"
    assert field_refused({"x": nested(20_000)}) == f"{FIELD}.x"


def test_size_is_bounded() -> None:
    check({"x": "y" * 16_000})

    assert field_refused({"x": "y" * 17_000}) == FIELD
    assert field_refused({f"x{n}": n for n in range(2000)}) == FIELD
    with pytest.raises(InvalidParameterError, match="too long"):
        from_json({"x": "[" * 20_000})


@pytest.mark.parametrize("text", ["False", "", "high", "{'a': 1}", "[" * 10_000, "1 2"])
def test_text_that_is_no_json_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidParameterError, match="is no JSON value") as caught:
        from_json({"thinking": text})
    assert caught.value.field == f"{FIELD}.thinking"


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "[1e999]", '"\\ud800"', '{"\\udfff": 1}'])
def test_values_that_no_prompt_can_hold_are_refused_by_name(text: str) -> None:
    assert field_refused(from_json({"x": text})) == f"{FIELD}.x"
