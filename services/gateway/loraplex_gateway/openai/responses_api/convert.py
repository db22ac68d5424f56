"""From a Responses body to the request of a chat completion that asks for the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.openai import objects
from loraplex_gateway.openai.as_chat import Words, chat_plan_of
from loraplex_gateway.openai.body import decode
from loraplex_gateway.openai.convert import Plan
from loraplex_gateway.openai.other_names import renames
from loraplex_gateway.openai.responses_api import fields, items, schema
from loraplex_gateway.openai.responses_api.schema import FunctionTool, ResponsesBody

if TYPE_CHECKING:
    from loraplex_gateway.openai.model_names import IsBase
    from loraplex_gateway.openai.tracing import Origin

RENAMES: Final = renames(
    (r"tools\[(\d+)\]\.function\b", r"tools[\1]"),
    (r"response_format\.json_schema\b", "text.format"),
    (r"\bresponse_format\b", "text.format"),
    (r"\bmax_completion_tokens\b", "max_output_tokens"),
    (r"\breasoning_effort\b", "reasoning.effort"),
    (r"(input\[\d+\])\.id\b", r"\1.call_id"),
)
KNOWN_CHOICES: Final = ("none", "auto", "required")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A Responses request: what to generate, and the body, whose settings the answer repeats."""

    plan: Plan
    body: ResponsesBody
    tools: tuple[FunctionTool, ...]


def responses_request(data: bytes, is_base: IsBase, *, origin: Origin) -> Asked:
    """Return what the bytes of a body ask for.

    Raises:
        InvalidParameterError: For what is not served.
    """
    body = decode(data, ResponsesBody, fields.RESPONSES)
    chat = items.conversation(body.input, body.instructions)
    tools = tuple(
        tool for tool in objects.read_all(body.tools or [], schema.TOOLS, "tools") if isinstance(tool, FunctionTool)
    )
    words = Words(table=fields.RESPONSES, renames=RENAMES, chat=chat)
    own = {
        "messages": chat.turns,
        "max_completion_tokens": body.max_output_tokens,
        "chat_template_kwargs": body.chat_template_kwargs,
        **_logprobs(body),
        **_tools(body, tools),
        **_format(body),
        **({"reasoning_effort": body.reasoning.effort} if body.reasoning and body.reasoning.effort else {}),
    }
    plan = chat_plan_of(body, own, is_base, origin=origin, words=words)
    if body.truncation == "auto":
        requests = tuple(replace(request, truncate_prompt_tokens=-1) for request in plan.requests)
        plan = replace(plan, requests=requests)
    return Asked(plan=plan, body=body, tools=tools)


def _logprobs(body: ResponsesBody) -> dict[str, Any]:
    wanted = False
    for n, name in enumerate(body.include or []):
        if name not in (fields.LOGPROBS, fields.ENCRYPTED):
            raise InvalidParameterError(
                f"include[{n}] is not supported: {name[:64]!r} is not part of any answer here; leave it out",
                field=f"include[{n}]",
            )
        wanted |= name == fields.LOGPROBS
    if body.top_logprobs and not wanted:
        raise InvalidParameterError(
            f"top_logprobs is not supported without {fields.LOGPROBS!r} in include", field="top_logprobs"
        )
    return {"logprobs": True, "top_logprobs": body.top_logprobs} if wanted else {}


def _format(body: ResponsesBody) -> dict[str, Any]:
    wanted = body.text.format if body.text is not None else None
    if wanted is None or wanted.type == "text":
        return {}
    if wanted.type == "json_object":
        return {"response_format": {"type": "json_object"}}
    for name in ("name", "schema"):
        if getattr(wanted, name) is None:
            field = f"text.format.{name}"
            raise InvalidParameterError(f"{field} is missing: a json_schema has a name and a schema", field=field)
    described = {"name": wanted.name, "schema": wanted.schema}
    if wanted.strict is not None:
        described["strict"] = wanted.strict
    return {"response_format": {"type": "json_schema", "json_schema": described}}


def _tools(body: ResponsesBody, tools: tuple[FunctionTool, ...]) -> dict[str, Any]:
    choice, allowed = _choice(body.tool_choice, tools)
    if not tools:
        return {} if choice in ("auto", "none") else {"tool_choice": choice}
    described = [_chat_tool(tool) for tool in tools if allowed is None or tool.name in allowed]
    return {"tools": described, "tool_choice": choice, "parallel_tool_calls": body.parallel_tool_calls}


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    for name in ("description", "parameters", "strict"):
        if (value := getattr(tool, name)) is not None:
            function[name] = value
    return {"type": "function", "function": function}


def _choice(given: str | dict[str, Any], tools: tuple[FunctionTool, ...]) -> tuple[Any, frozenset[str] | None]:
    """Return chat's tool_choice, and the names of the tools to choose from; None for all."""
    if isinstance(given, str):
        if given not in KNOWN_CHOICES:
            raise InvalidParameterError(
                f"tool_choice is {given[:64]!r}; it must be none, auto, required or an object", field="tool_choice"
            )
        return given, None
    kind = given.get("type")
    if kind == "function":
        name = _known_name(given, tools, "tool_choice")
        return {"type": "function", "function": {"name": name}}, None
    if kind == "allowed_tools":
        return _allowed(given, tools)
    raise InvalidParameterError(
        f"tool_choice.type is not supported: {str(kind)[:64]!r} is not served; {fields.NO_HOSTED}",
        field="tool_choice.type",
    )


def _allowed(given: dict[str, Any], tools: tuple[FunctionTool, ...]) -> tuple[str, frozenset[str]]:
    mode, listed = given.get("mode"), given.get("tools")
    if mode not in ("auto", "required"):
        raise InvalidParameterError("tool_choice.mode must be auto or required", field="tool_choice.mode")
    if not isinstance(listed, list) or not listed:
        raise InvalidParameterError("tool_choice.tools must list some of the tools", field="tool_choice.tools")
    names = []
    for n, tool in enumerate(listed):
        where = f"tool_choice.tools[{n}]"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise InvalidParameterError(f"{where} must be of type function; {fields.NO_HOSTED}", field=where)
        names.append(_known_name(tool, tools, where))
    return mode, frozenset(names)


def _known_name(named: dict[str, Any], tools: tuple[FunctionTool, ...], where: str) -> str:
    name = named.get("name")
    if not isinstance(name, str) or all(tool.name != name for tool in tools):
        shown = repr(name[:64]) if isinstance(name, str) else "no name"
        raise InvalidParameterError(f"{where}.name is {shown}, which is not among tools", field=f"{where}.name")
    return name
