"""From a chat body's conversation, functions and choices to our prompt and how its output is taken apart."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.openai.fields import ONLY_FUNCTIONS
from loraplex_gateway.text.prompt_size import check_num_messages
from loraplex_gateway.types import ChatMessage, ChatPrompt, OutputParsing, ToolCall, ToolMode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_gateway.openai.schema import ChatBody, ChatTurn, ContentPart, Tool, TurnToolCall

    Functions = tuple[Mapping[str, Any], ...]

CHOICES = (
    'tool_choice must be "none", "auto", "required", {"type": "function", "function": {"name": ...}} or '
    '{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}'
)


def chat_prompt(body: ChatBody) -> tuple[ChatPrompt, OutputParsing]:
    """Return what a chat body says, and how its output is taken apart.

    The functions of a choice are all that the model hears of: none for "none", those that are named or allowed.

    Raises:
        InvalidParameterError: For what is not served, or a choice of a function that is not offered.
    """
    check_num_messages(len(body.messages))
    offered = tuple(offered_function(n, tool) for n, tool in enumerate(body.tools or ()))
    mode, functions = chosen_functions(body.tool_choice, offered)
    prompt = ChatPrompt(
        messages=tuple(chat_message(n, turn) for n, turn in enumerate(body.messages)),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_kwargs=body.chat_template_kwargs or {},
        tools=functions,
        documents=tuple(body.documents or ()),
        reasoning_effort=body.reasoning_effort,
        template=body.chat_template,
    )
    is_parallel = body.parallel_tool_calls and not names_function(body.tool_choice)
    parsing = OutputParsing(tool_mode=mode, is_parallel=is_parallel)
    return prompt, parsing


def names_function(choice: str | dict[str, Any] | None) -> bool:
    """Return whether a tool_choice is one function's name."""
    return isinstance(choice, dict) and choice.get("type") == "function"


def chosen_functions(choice: str | dict[str, Any] | None, offered: Functions) -> tuple[ToolMode, Functions]:
    """Return whether functions may or must be called, and which.

    Args:
        choice: OpenAI's ``tool_choice``; None for its default.
        offered: The functions of ``tools``.

    Raises:
        InvalidParameterError: For an unknown choice, or one of a function that is not offered.
    """
    if choice is None:
        return (ToolMode.AUTO if offered else ToolMode.NONE), offered
    if choice == "none":
        return ToolMode.NONE, ()
    if choice == "auto":
        return (ToolMode.AUTO if offered else ToolMode.NONE), offered
    if choice == "required":
        return _must_be_offered(ToolMode.REQUIRED, offered)
    if not isinstance(choice, dict):
        raise InvalidParameterError(CHOICES, field="tool_choice")
    if names_function(choice):
        functions = _named(offered, [choice], "tool_choice")
        _check_names(choice)
        return ToolMode.REQUIRED, functions
    allowed = choice.get("allowed_tools")
    if choice.get("type") != "allowed_tools" or not isinstance(allowed, dict):
        raise InvalidParameterError(CHOICES, field="tool_choice")
    tools, mode = allowed.get("tools"), allowed.get("mode", "auto")
    if not isinstance(tools, list) or mode not in ("auto", "required"):
        raise InvalidParameterError(CHOICES, field="tool_choice.allowed_tools")
    _check_names(choice)
    return _must_be_offered(ToolMode(mode), _named(offered, tools, "tool_choice.allowed_tools"))


def _check_names(choice: dict[str, Any]) -> None:
    """Refuse members of a tool_choice that have no meaning there, or are not those of its type."""
    own = "function" if names_function(choice) else "allowed_tools"
    for where, value, known in (
        ("tool_choice", choice, {"type", own}),
        ("tool_choice.function", choice.get("function"), {"name"}),
        ("tool_choice.allowed_tools", choice.get("allowed_tools"), {"mode", "tools"}),
    ):
        for name in (value if isinstance(value, dict) else {}).keys() - known:
            field = f"{where}.{name[:64]}"
            raise InvalidParameterError(f"unknown field {field}; leave it out", field=field)


def _must_be_offered(mode: ToolMode, functions: Functions) -> tuple[ToolMode, Functions]:
    if not functions:
        raise InvalidParameterError(f"tool_choice is {mode.value}, but no tools are offered", field="tool_choice")
    return mode, functions


def _named(offered: Functions, choices: list[Any], field: str) -> Functions:
    """Return the offered functions that are named, in the order of the offer."""
    names = set()
    for choice in choices:
        function = choice.get("function") if isinstance(choice, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str):
            raise InvalidParameterError(CHOICES, field=field)
        if not any(known["name"] == name for known in offered):
            raise InvalidParameterError(f"{field} names {name[:64]!r}, which is not among tools", field=field)
        names.add(name)
    return tuple(known for known in offered if known["name"] in names)


def callable_tools(body: ChatBody, prompt: ChatPrompt) -> tuple[int, ...]:
    """Return which of a body's `tools` its prompt has: those that may be called."""
    names = {function["name"] for function in prompt.tools}
    return tuple(n for n, tool in enumerate(body.tools or ()) if tool.function and tool.function.name in names)


def offered_function(n: int, tool: Tool) -> Mapping[str, Any]:
    """Return one function of a body's `tools`.

    Raises:
        InvalidParameterError: If it is none.
    """
    if tool.type != "function" or tool.function is None:
        field = f"tools[{n}].type" if tool.type != "function" else f"tools[{n}].function"
        raise InvalidParameterError(f"{field} is not supported: {ONLY_FUNCTIONS}", field=field)
    function: dict[str, Any] = msgspec.to_builtins(tool.function)
    return function


def _calls(calls: list[TurnToolCall]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(id=call.id, name=call.function.name, arguments=_text_of(call)) for call in calls)


def _text_of(call: TurnToolCall) -> str:
    arguments = call.function.arguments
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def chat_message(n: int, turn: ChatTurn) -> ChatMessage:
    """Return one turn of a body.

    Raises:
        InvalidParameterError: If it has no content, or one that is no text, or two different thoughts.
    """
    content, calls = turn.content, _calls(turn.tool_calls or [])
    if turn.reasoning and turn.reasoning_content and turn.reasoning != turn.reasoning_content:
        field = f"messages[{n}].reasoning"
        raise InvalidParameterError(
            f"{field} and messages[{n}].reasoning_content differ; send one of them", field=field
        )
    if content is None:
        if not calls and not (turn.role == "assistant" and (turn.reasoning_content or turn.reasoning)):
            raise InvalidParameterError(f"messages[{n}].content is missing", field=f"messages[{n}].content")
        content = ""
    if isinstance(content, list):
        content = "\n".join(_part(f"messages[{n}].content[{i}]", part) for i, part in enumerate(content))
    # Newer clients say developer where models and their templates know system.
    role = "system" if turn.role == "developer" else turn.role
    return ChatMessage(
        role=role,
        content=content,
        name=turn.name,
        tool_calls=calls,
        tool_call_id=turn.tool_call_id,
        reasoning=turn.reasoning_content or turn.reasoning,
    )


def _part(field: str, part: ContentPart) -> str:
    if part.type != "text":
        raise InvalidParameterError(
            f"{field}.type is not supported: parts of type {part.type[:64]!r} are not served, only text",
            field=f"{field}.type",
        )
    if part.text is None:
        raise InvalidParameterError(f"{field}.text is missing", field=f"{field}.text")
    return part.text
