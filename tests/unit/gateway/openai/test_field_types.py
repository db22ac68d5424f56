"""A value of another JSON type than its field's is refused, in every body of the HTTP port; no string is read as a number."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, get_type_hints

import pytest
from loraplex_common.errors import InvalidParameterError
from loraplex_gateway.openai.adapter_bodies import LoadAdapterBody, UnloadAdapterBody
from loraplex_gateway.openai.body import BODIES, decode
from loraplex_gateway.openai.field_rules import Rule, Table
from loraplex_gateway.openai.messages_api import fields as messages_fields
from loraplex_gateway.openai.messages_api.schema import CountTokensBody, MessagesBody
from loraplex_gateway.openai.responses_api import fields as responses_fields
from loraplex_gateway.openai.responses_api.schema import ResponsesBody
from loraplex_gateway.openai.schema import ChatBody, CompletionBody
from loraplex_gateway.openai.tokenize_bodies import DetokenizeBody, TokenizeBody

if TYPE_CHECKING:
    import msgspec

TURNS = [{"role": "user", "content": "x"}]
# A body of each kind with what it must have.
REQUIRED: dict[type[msgspec.Struct], dict[str, Any]] = {
    ChatBody: {"model": "m", "messages": TURNS},
    CompletionBody: {"model": "m", "prompt": "x"},
    ResponsesBody: {"model": "m", "input": "x"},
    MessagesBody: {"model": "m", "messages": TURNS, "max_tokens": 1},
    CountTokensBody: {"model": "m", "messages": TURNS},
    TokenizeBody: {"prompt": "x"},
    DetokenizeBody: {"tokens": [1]},
    LoadAdapterBody: {"lora_name": "a", "lora_path": "/a"},
    UnloadAdapterBody: {"lora_name": "a"},
}
TABLES: dict[type[msgspec.Struct], Table] = {
    **BODIES,
    ResponsesBody: responses_fields.RESPONSES,
    MessagesBody: messages_fields.MESSAGES,
    CountTokensBody: messages_fields.COUNT_TOKENS,
}
REFUSED: dict[Any, list[Any]] = {
    bool: ["true", "True", "1", 1, 0, 1.0],
    int: ["1", "", True, 1.5, [1], 1e300],
    float: ["1", "0.5", True, [1]],
    str: [1, True, ["x"], {}],
    list[int]: [["1"], [True], [1.5], "1", 1],
    list[str]: [[1], [True], 1],
    dict[str, float]: [{"5": "1"}, {"5": True}, []],
}
TAKEN: dict[Any, list[Any]] = {
    bool: [True, False],
    int: [1, 1.0, -0.0],
    float: [1, 1.5],
    list[int]: [[1, 2], [1.0, 2], []],
}


def fields_of(kind: Any) -> list[tuple[type[msgspec.Struct], str]]:
    """Return the served fields of all bodies that take values of one kind alone, or null."""
    found = []
    for struct in REQUIRED:
        for name, hint in get_type_hints(struct).items():
            known = TABLES[struct].fields.get(name)
            if hint in (kind, kind | None) and known is not None and known.rule is Rule.SERVED:
                found.append((struct, name))
    return found


def read(struct: type[msgspec.Struct], name: str, value: Any) -> Any:
    body = {**REQUIRED[struct], name: value}
    return getattr(decode(json.dumps(body).encode(), struct, TABLES[struct]), name)


def cases(kinds: dict[Any, list[Any]]) -> list[Any]:
    found = [(struct, name, values) for kind, values in kinds.items() for struct, name in fields_of(kind)]
    return [pytest.param(*case, id=f"{case[0].__name__}.{case[1]}") for case in found]


def test_every_body_is_among_those_that_are_tried() -> None:
    assert set(REQUIRED) == set(TABLES)
    for kind in (*REFUSED, *TAKEN):
        assert fields_of(kind), kind


@pytest.mark.parametrize(("struct", "name", "values"), cases(REFUSED))
def test_a_value_of_another_type_is_refused_by_name(struct: type[msgspec.Struct], name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidParameterError) as caught:
            read(struct, name, value)
        assert (caught.value.field or "").startswith(name), value


@pytest.mark.parametrize(("struct", "name", "values"), cases(TAKEN))
def test_an_integer_is_a_number_and_so_is_a_float_without_a_fraction(
    struct: type[msgspec.Struct], name: str, values: list[Any]
) -> None:
    for value in values:
        assert read(struct, name, value) == value
        if isinstance(value, list):
            assert all(type(item) is int for item in read(struct, name, value))


def test_numbers_inside_what_is_passed_on_stay_as_they_were_sent() -> None:
    schema = {"type": "number", "minimum": 1.0}
    body = {**REQUIRED[ChatBody], "n": 1.0, "seed": 2.0, "guided_json": schema}

    chat = decode(json.dumps(body).encode(), ChatBody)

    assert (chat.n, chat.seed) == (1, 2)
    assert type(chat.guided_json["minimum"]) is float


def test_what_stands_in_an_object_of_a_body_is_as_strict() -> None:
    for options in ({"include_usage": "true"}, {"include_usage": 1}):
        with pytest.raises(InvalidParameterError, match=r"stream_options\.include_usage"):
            read(ChatBody, "stream_options", options)
    with pytest.raises(InvalidParameterError, match="disable_parallel_tool_use"):
        read(MessagesBody, "tool_choice", {"type": "auto", "disable_parallel_tool_use": "true"})
