"""What functions a conversation may offer and which calls it may quote, checked before any template sees them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.text.template_variables import is_unicode, json_problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from loraplex_gateway.types import ChatMessage, ChatPrompt

Violation = tuple[str, str]

MAX_TOOLS: Final = 128
MAX_BYTES: Final = 256 * 1024  # of all functions, as JSON
MAX_DEPTH: Final = 32
MAX_CALLS: Final = 128  # of one turn
MAX_ID_CHARS: Final = 256
MAX_DOCUMENTS: Final = 128
MAX_TEMPLATE_BYTES: Final = 64 * 1024
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def from_json(texts: Sequence[str]) -> tuple[Mapping[str, Any], ...]:
    """Read functions that are JSON texts.

    Raises:
        InvalidParameterError: If there are too many, or one is no JSON object; it is named.
    """
    if len(texts) > MAX_TOOLS or sum(len(text) for text in texts) > MAX_BYTES:
        raise InvalidParameterError(
            f"tools are too many: at most {MAX_TOOLS} functions and {MAX_BYTES} bytes are allowed", field="tools"
        )
    functions = []
    for n, text in enumerate(texts):
        try:
            function = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidParameterError(f"tools[{n}] is no JSON: {error}", field=f"tools[{n}]") from error
        if not isinstance(function, dict):
            raise InvalidParameterError(f"tools[{n}] is no JSON object", field=f"tools[{n}]")
        functions.append(function)
    return tuple(functions)


def violations(prompt: ChatPrompt) -> Iterator[Violation]:
    """Yield (field, what is wrong) for functions, calls, results, documents and a template of the request's own."""
    yield from _tools(prompt)
    for n, message in enumerate(prompt.messages):
        yield from _turn(f"messages[{n}]", message)
    if len(prompt.documents) > MAX_DOCUMENTS:
        yield "documents", f"documents has {len(prompt.documents)} entries; at most {MAX_DOCUMENTS} are allowed"
    for n, document in enumerate(prompt.documents):
        if (problem := json_problem(document, MAX_DEPTH)) is not None:
            yield f"documents[{n}]", f"documents[{n}] {problem}"
    if prompt.template is not None:
        if len(prompt.template.encode(errors="surrogatepass")) > MAX_TEMPLATE_BYTES:
            yield "chat_template", f"chat_template is too long: at most {MAX_TEMPLATE_BYTES} bytes are allowed"
        elif not is_unicode(prompt.template):
            yield "chat_template", "chat_template holds lone surrogates, which cannot be encoded as UTF-8"


def _tools(prompt: ChatPrompt) -> Iterator[Violation]:
    if len(prompt.tools) > MAX_TOOLS:
        yield "tools", f"tools has {len(prompt.tools)} entries; at most {MAX_TOOLS} are allowed"
        return
    seen: set[str] = set()
    for n, function in enumerate(prompt.tools):
        field = f"tools[{n}].function"
        if (problem := json_problem(function, MAX_DEPTH)) is not None:
            yield field, f"{field} {problem}"
            return
        yield from _function(field, function)
        if (name := str(function.get("name"))) in seen:
            yield f"{field}.name", f"{field}.name: {name[:64]!r} is offered twice"
        seen.add(name)
    if (num_bytes := len(json.dumps(prompt.tools, ensure_ascii=False).encode())) > MAX_BYTES:
        yield "tools", f"tools has {num_bytes} bytes as JSON; at most {MAX_BYTES} are allowed"


def _function(field: str, function: Mapping[str, Any]) -> Iterator[Violation]:
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        yield f"{field}.name", f"{field}.name must be 1 to 64 letters, digits, _ and -"
    if parameters is not None and not isinstance(parameters, dict):
        yield f"{field}.parameters", f"{field}.parameters must be a JSON schema, an object"
    elif parameters and parameters.get("type", "object") not in ("object", ["object"]):
        yield f"{field}.parameters", f"{field}.parameters.type must be object: arguments have names"


def _turn(field: str, message: ChatMessage) -> Iterator[Violation]:
    if len(message.tool_calls) > MAX_CALLS:
        yield f"{field}.tool_calls", f"{field}.tool_calls has more than {MAX_CALLS} entries"
        return
    texts = {"name": message.name, "tool_call_id": message.tool_call_id, "reasoning": message.reasoning}
    for n, call in enumerate(message.tool_calls):
        where = f"tool_calls[{n}]"
        texts |= {f"{where}.id": call.id, f"{where}.function.arguments": call.arguments}
        if not _NAME.fullmatch(call.name):
            yield f"{field}.{where}.function.name", f"{field}.{where}.function.name is no function's name"
    for name, text in texts.items():
        if text is not None and not is_unicode(text):
            yield f"{field}.{name}", f"{field}.{name} holds lone surrogates, which cannot be encoded as UTF-8"
        if text is not None and name.endswith("id") and len(text) > MAX_ID_CHARS:
            yield f"{field}.{name}", f"{field}.{name} has {len(text)} characters; at most {MAX_ID_CHARS} are allowed"
    if message.tool_calls and message.role != "assistant":
        yield f"{field}.tool_calls", f"{field}.tool_calls is for turns of the role assistant, not {message.role[:32]!r}"
