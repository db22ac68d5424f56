"""From a Messages body to the request of a chat completion that asks for the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.openai import objects
from loraplex_gateway.openai.as_chat import Words, chat_plan_of
from loraplex_gateway.openai.body import decode
from loraplex_gateway.openai.messages_api import fields, schema, turns
from loraplex_gateway.openai.messages_api.schema import CountTokensBody, CustomTool, MessagesBody
from loraplex_gateway.openai.other_names import renames

if TYPE_CHECKING:
    from loraplex_gateway.openai.convert import Plan
    from loraplex_gateway.openai.fields import Table
    from loraplex_gateway.openai.model_names import IsBase
    from loraplex_gateway.openai.other_names import Chat
    from loraplex_gateway.openai.tracing import Origin

Body = TypeVar("Body", MessagesBody, CountTokensBody)
RENAMES: Final = renames(
    (r"tools\[(\d+)\]\.function\.parameters\b", r"tools[\1].input_schema"),
    (r"tools\[(\d+)\]\.function\b", r"tools[\1]"),
    (r"tool_choice\.function\b", "tool_choice"),
    (r"response_format\.json_schema\b", "output_config.format"),
    (r"\bresponse_format\b", "output_config.format"),
    (r"\bmax_completion_tokens\b", "max_tokens"),
    (r"\breasoning_effort\b", "output_config.effort"),
    (r"(content\[\d+\])\.arguments\b", r"\1.input"),
)
CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}
# Variables with which templates of the common families turn thoughts on and off; the others do not look at them.
THINKING_SWITCHES: Final = ("enable_thinking", "thinking")


def messages_plan(data: bytes, is_base: IsBase, *, origin: Origin) -> Plan:
    """Return what the bytes of a body of /v1/messages ask for.

    Raises:
        InvalidParameterError: For what is not served.
    """
    body = decode(data, MessagesBody, fields.MESSAGES)
    limits = {"max_completion_tokens": body.max_tokens, "stop": body.stop_sequences}
    return _plan(body, fields.MESSAGES, limits, is_base, origin=origin)


def count_tokens_plan(data: bytes, is_base: IsBase, *, origin: Origin) -> Plan:
    """Return the plan of a generation whose prompt's tokens are to be counted.

    Raises:
        InvalidParameterError: For what is not served.
    """
    body = decode(data, CountTokensBody, fields.COUNT_TOKENS)
    return _plan(body, fields.COUNT_TOKENS, {}, is_base, origin=origin)


def _plan(body: Body, table: Table, limits: dict[str, Any], is_base: IsBase, *, origin: Origin) -> Plan:
    chat = turns.conversation(body.messages, body.system)
    words = Words(table=table, renames=RENAMES, chat=chat)
    own = {
        "messages": chat.turns,
        "chat_template_kwargs": _template_kwargs(body),
        **limits,
        **_continuation(chat),
        **_tools(body),
        **_output(body),
    }
    return chat_plan_of(body, own, is_base, origin=origin, words=words)


def _continuation(chat: Chat) -> dict[str, Any]:
    return {"continue_final_message": True, "add_generation_prompt": False} if turns.continues(chat) else {}


def _template_kwargs(body: Body) -> dict[str, Any] | None:
    given = body.chat_template_kwargs
    if body.thinking is None or body.thinking.type == "adaptive":
        return given
    switches = dict.fromkeys(THINKING_SWITCHES, body.thinking.type == "enabled")
    return {**switches, **(given or {})}


def _output(body: Body) -> dict[str, Any]:
    config = body.output_config
    wanted: dict[str, Any] = {}
    if config is not None and config.format is not None:
        described = {"name": "output", "schema": config.format.schema, "strict": True}
        wanted["response_format"] = {"type": "json_schema", "json_schema": described}
    if config is not None and config.effort is not None:
        wanted["reasoning_effort"] = config.effort
    return wanted


def _tools(body: Body) -> dict[str, Any]:
    tools = [tool for tool in objects.read_all(body.tools or [], schema.TOOLS, "tools") if isinstance(tool, CustomTool)]
    choice = body.tool_choice
    if not tools:
        if choice is not None and choice.type in ("any", "tool"):
            raise InvalidParameterError("tool_choice is not supported without tools", field="tool_choice")
        return {}
    wanted: dict[str, Any] = {"tools": [_chat_tool(tool) for tool in tools]}
    if choice is None:
        return wanted
    if choice.type != "tool" and choice.name is not None:
        raise InvalidParameterError("tool_choice.name goes with type tool; leave it out", field="tool_choice.name")
    if choice.type == "tool":
        if choice.name is None or all(tool.name != choice.name for tool in tools):
            raise InvalidParameterError(
                f"tool_choice.name is {choice.name!r:.70}, which is not among tools", field="tool_choice.name"
            )
        wanted["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        wanted["tool_choice"] = CHOICES[choice.type]
    return {**wanted, "parallel_tool_calls": not choice.disable_parallel_tool_use}


def _chat_tool(tool: CustomTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    for name in ("description", "strict"):
        if (value := getattr(tool, name)) is not None:
            function[name] = value
    return {"type": "function", "function": function}
