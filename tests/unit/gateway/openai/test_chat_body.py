"""What a chat body says of functions: which the model hears of, and whether it must call one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from loraplex_common.errors import InvalidParameterError
from loraplex_gateway.openai.body import decode
from loraplex_gateway.openai.chat_body import chat_prompt
from loraplex_gateway.openai.schema import ChatBody
from loraplex_gateway.requests.validation import check_prompt
from loraplex_gateway.text import tool_rules
from loraplex_gateway.text.prompt_size import prompt_bytes
from loraplex_gateway.types import ChatPrompt, OutputParsing, ToolMode

USER = {"role": "user", "content": "hi"}
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("a", "b", "c")]


def prompt_of(**fields: Any) -> tuple[ChatPrompt, OutputParsing]:
    body = {"model": "m", "messages": [USER], **fields}
    return chat_prompt(decode(json.dumps(body).encode(), ChatBody))


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


@pytest.mark.parametrize(
    ("choice", "mode", "names", "is_parallel"),
    [
        (None, ToolMode.AUTO, "abc", True),
        ("auto", ToolMode.AUTO, "abc", True),
        ("none", ToolMode.NONE, "", True),
        ("required", ToolMode.REQUIRED, "abc", True),
        (named("b"), ToolMode.REQUIRED, "b", False),
        (allowed("auto", "c", "a"), ToolMode.AUTO, "ac", True),
        (allowed("required", "c"), ToolMode.REQUIRED, "c", True),
    ],
)
def test_the_choice_says_which_functions_there_are(choice: Any, mode: ToolMode, names: str, is_parallel: bool) -> None:
    prompt, parsing = prompt_of(tools=TOOLS, tool_choice=choice)

    assert [function["name"] for function in prompt.tools] == list(names)
    assert parsing == OutputParsing(tool_mode=mode, is_parallel=is_parallel)


@pytest.mark.parametrize(
    "choice", ["any", "b", {"type": "tool"}, named("d"), allowed("none", "a"), allowed("auto", "d")]
)
def test_a_choice_that_cannot_be_is_refused(choice: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        prompt_of(tools=TOOLS, tool_choice=choice)

    assert (caught.value.field or "").startswith("tool_choice")


@pytest.mark.parametrize(
    ("choice", "field"),
    [
        ({**named("a"), "mode": "auto"}, "tool_choice.mode"),
        ({**named("a"), "allowed_tools": {}}, "tool_choice.allowed_tools"),
        ({"type": "function", "function": {"name": "a", "strict": True}}, "tool_choice.function.strict"),
        (
            {"type": "allowed_tools", "allowed_tools": {"tools": [named("a")], "max": 1}},
            "tool_choice.allowed_tools.max",
        ),
    ],
)
def test_nothing_in_a_choice_is_dropped_in_silence(choice: Any, field: str) -> None:
    with pytest.raises(InvalidParameterError, match="unknown field") as caught:
        prompt_of(tools=TOOLS, tool_choice=choice)

    assert caught.value.field == field


def test_a_turn_has_one_text_of_thoughts_under_either_name() -> None:
    turn = {"role": "assistant", "content": "x", "reasoning": "a"}
    assert prompt_of(messages=[USER, {**turn, "reasoning_content": "a"}])[0].messages[1].reasoning == "a"

    with pytest.raises(InvalidParameterError, match="send one of them") as caught:
        prompt_of(messages=[USER, {**turn, "reasoning_content": "b"}])

    assert caught.value.field == "messages[1].reasoning"


@pytest.mark.parametrize("choice", ["required", named("a")])
def test_no_function_can_be_called_where_none_is_offered(choice: Any) -> None:
    with pytest.raises(InvalidParameterError):
        prompt_of(tool_choice=choice)


def test_turns_keep_their_calls_results_and_thoughts() -> None:
    function = {"name": "a", "arguments": {"x": "\u4f60"}}
    turns = [
        {"role": "developer", "content": "be brief"},
        {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [{"id": "c1", "function": function}]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "5"}]},
    ]
    prompt, _ = prompt_of(messages=turns)
    system, assistant, tool = prompt.messages

    assert (system.role, assistant.content, assistant.reasoning) == ("system", "", "hm")
    assert (assistant.tool_calls[0].id, json.loads(assistant.tool_calls[0].arguments)) == ("c1", {"x": "\u4f60"})
    assert (tool.role, tool.tool_call_id, tool.content) == ("tool", "c1", "5")


@pytest.mark.parametrize("turn", [{"role": "user"}, {"role": "user", "content": None}, {"role": "assistant"}])
def test_a_turn_without_content_or_call_is_refused(turn: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameterError, match=r"messages\[0\].content is missing"):
        prompt_of(messages=[turn])


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"properties": {"x": schema}}
    return schema


@pytest.mark.parametrize(
    ("functions", "field"),
    [
        ([{"name": "a b"}], "tools[0].function.name"),
        ([{"name": "x" * 65}], "tools[0].function.name"),
        ([{"name": "a"}, {"name": "a"}], "tools[1].function.name"),
        ([{"name": "a", "parameters": {"type": "string"}}], "tools[0].function.parameters"),
        ([{"name": "a", "parameters": nested(40)}], "tools[0].function"),
        ([{"name": f"f{n}"} for n in range(tool_rules.MAX_TOOLS + 1)], "tools"),
        ([{"name": "a", "description": "x" * tool_rules.MAX_BYTES}], "tools"),
    ],
)
def test_functions_are_bounded_before_a_template_sees_them(functions: list[dict[str, Any]], field: str) -> None:
    prompt, _ = prompt_of(tools=[{"type": "function", "function": function} for function in functions])

    with pytest.raises(InvalidParameterError) as caught:
        check_prompt(prompt)

    assert caught.value.violations[0][0] == field


@pytest.mark.parametrize("kind", ["object", ["object"]])
def test_arguments_are_an_object_however_their_type_is_written(kind: str | list[str]) -> None:
    prompt, _ = prompt_of(tools=[{"type": "function", "function": {"name": "a", "parameters": {"type": kind}}}])

    check_prompt(prompt)


@pytest.mark.parametrize(
    ("turn", "field"),
    [
        ({"role": "user", "content": "x", "tool_calls": [{"function": {"name": "a"}}]}, "messages[0].tool_calls"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "a b"}}]},
            "messages[0].tool_calls[0].function.name",
        ),
        ({"role": "tool", "content": "x", "tool_call_id": "c" * 300}, "messages[0].tool_call_id"),
    ],
)
def test_calls_in_the_conversation_are_checked(turn: dict[str, Any], field: str) -> None:
    prompt, _ = prompt_of(messages=[turn])

    with pytest.raises(InvalidParameterError) as caught:
        check_prompt(prompt)

    assert caught.value.violations[0][0] == field


def test_all_that_a_template_may_write_out_counts_as_the_prompts_bytes() -> None:
    plain, _ = prompt_of()
    call = {"function": {"name": "a", "arguments": json.dumps({"x": "y" * 1000})}}
    turns = [USER, {"role": "assistant", "reasoning": "z" * 1000, "tool_calls": [call]}]
    full, _ = prompt_of(
        messages=turns,
        tools=[{"type": "function", "function": {"name": "a", "description": "d" * 1000}}],
        documents=[{"text": "t" * 1000}],
        chat_template="c" * 1000,
    )

    assert prompt_bytes(full) > prompt_bytes(plain) + 5000
