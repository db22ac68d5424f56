"""Random requests whose functions are strict, and what must hold of their answers."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from jsonschema import Draft202012Validator, FormatChecker, ValidationError
from loraplex_common.errors import InvalidParameterError
from loraplex_common.structured_output import ConstraintKind
from support.base_models import EOS
from support.constraint_rig import begins, compile_here
from support.random_schemas import random_object, random_schema

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from random import Random

TEMPERATURES: Final = (0.0, 0.3, 0.7, 1.0, 1.5, 2.0)
MAX_TOKENS: Final = 440
CHECKER: Final = FormatChecker([name for name in FormatChecker.checkers if name != "time"])  # theirs has no time zones
_HEAD: Final = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | length }} functions\n{% endif %}{% for m in messages if m.tool_calls %}"
)
_TAIL: Final = "{% endfor %}<|im_start|>assistant\n"
_CALL: Final = "{{ m.tool_calls[0].function.name }}"
TEMPLATES: Final = {
    "hermes": f"{_HEAD}<tool_call>{_CALL}</tool_call>{_TAIL}",
    "qwen3_coder": f"{_HEAD}<tool_call><function={_CALL}><parameter=a></tool_call>{_TAIL}",
    "llama3_json": f"{_HEAD}<|python_tag|>{_CALL}{_TAIL}",
    "mistral": f"{_HEAD}[TOOL_CALLS][{_CALL}]{_TAIL}",
    "mistral_named": f"{_HEAD}[TOOL_CALLS]{_CALL}[ARGS]{_TAIL}",
}
"""Format -> a chat template from which a gateway knows it."""
OPENINGS: Final = {"llama3_json": "{", "mistral": "[TOOL_CALLS]", "mistral_named": "[TOOL_CALLS]"}
"""Format -> what begins a call; the others' is Hermes'."""
BIASES: Final = {EOS: 9, '"': 5, "]": 6, "}": 6, "\u0120": -4, "\u010a": -4, "\u0109": -4, "\u010d": -4}
"""Bias of what ends texts, lists, objects and the output, and of blanks as a tokenizer has them; most outputs would be cut."""
MARKERS: Final = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")


@dataclass(frozen=True, kw_only=True)
class CallRequest:
    """One request.

    Attributes:
        body: A body of POST /v1/chat/completions.
        functions: Name -> an offered function that may be called.
        is_forced: Whether the answer must be calls.
    """

    body: dict[str, Any]
    functions: dict[str, dict[str, Any]]
    is_forced: bool

    @property
    def is_parallel(self) -> bool:
        """Whether there may be several calls."""
        return bool(self.body["parallel_tool_calls"]) and not isinstance(self.body["tool_choice"], dict)

    def schema_of(self, name: str) -> dict[str, Any]:
        """Return what the arguments of a function must be: of one that need not be called and is not strict, any object."""
        function = self.functions[name]
        if not self.is_forced and not function.get("strict"):
            return {"type": "object"}
        parameters = function.get("parameters")
        return {"type": "object", **parameters} if parameters else {"type": "object", "additionalProperties": False}


@dataclass
class CallAnswer:
    """What came: calls are (name, arguments)."""

    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    finish_reason: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether the output ended by itself."""
        return self.finish_reason in ("stop", "tool_calls")


def make_call_request(
    rng: Random, models: Mapping[str, Sequence[str]], token_id: Callable[[str], int | None]
) -> CallRequest:
    """Return a random request.

    Args:
        rng: Draws it.
        models: Format -> names of models that write calls in it.
        token_id: Returns the id of the token that a text is as a whole.
    """
    names = rng.sample(("lamp", "get_weather", "a-b", "f1", "Z_"), rng.randint(1, 4))
    functions = {name: _function(rng, name) for name in names}
    fmt = rng.choice(list(models))
    mode = rng.choice(("required", "required", "named", "auto"))
    choice: Any = {"type": "function", "function": {"name": names[-1]}} if mode == "named" else mode
    biases = dict(BIASES) if rng.random() < 0.8 else {EOS: 9}  # some with long strings and many blanks, and cut
    if mode == "auto":
        functions[names[0]]["strict"] = True
        biases[OPENINGS.get(fmt, "<tool_call>")] = 14
    bias = {str(found): value for text, value in biases.items() if (found := token_id(text)) is not None}
    body = {
        "model": rng.choice(models[fmt]),
        "messages": [{"role": "user", "content": "".join(rng.choices("abc xyz", k=rng.randint(1, 12)))}],
        "tools": [{"type": "function", "function": function} for function in functions.values()],
        "tool_choice": choice,
        "parallel_tool_calls": rng.random() < 0.4,
        "temperature": rng.choice(TEMPERATURES),
        "seed": rng.randrange(2**31),
        "max_tokens": MAX_TOKENS,
        "logit_bias": bias,
        "stream": rng.random() < 0.5,
    }
    callable_ones = {names[-1]: functions[names[-1]]} if mode == "named" else functions
    return CallRequest(body=body, functions=callable_ones, is_forced=mode != "auto")


def _function(rng: Random, name: str) -> dict[str, Any]:
    function: dict[str, Any] = {"name": name, "description": "does it", "strict": rng.random() < 0.7}
    kind = rng.random()
    if kind < 0.08:
        return function | ({} if kind < 0.04 else {"parameters": {}})
    parameters = random_object(rng, 2)
    if kind < 0.2:
        part = random_schema(rng, 1)
        parameters = {"$defs": {"p": part}, **parameters}
        parameters["properties"]["of ref"] = {"$ref": "#/$defs/p"}
        parameters["required"] = [*parameters["required"], "of ref"]
        parameters.pop("maxProperties", None)
    if kind > 0.9:
        del parameters["type"]
    elif kind > 0.8:
        parameters["type"] = ["object"]
    if rng.random() < 0.85:
        parameters["x-guidance"] = {"whitespace_flexible": False}
    return function | {"parameters": parameters}


def faults(request: CallRequest, answer: CallAnswer) -> list[str]:
    """Return what is wrong with an answer, in words."""
    found = []
    if request.is_forced and answer.content:
        found.append(f"a call was forced, and there is text: {answer.content!r}")
    if len(answer.calls) > 1 and not request.is_parallel:
        found.append(f"{len(answer.calls)} calls, and one may be made")
    if answer.is_whole:
        if request.is_forced and not answer.calls:
            found.append("no call, and one must be made")
        named = isinstance(request.body["tool_choice"], dict)
        expected = "tool_calls" if answer.calls and not named else "stop"
        if answer.finish_reason != expected:
            found.append(f"the end is {answer.finish_reason}, not {expected}")
    elif answer.finish_reason != "length":
        found.append(f"the end is {answer.finish_reason!r}")
    for n, (name, arguments) in enumerate(answer.calls):
        is_cut = not answer.is_whole and n == len(answer.calls) - 1
        if name not in request.functions:
            found.append(f"a call of {name!r}, which is not offered")
        elif (problem := (_not_a_beginning if is_cut else _not_valid)(request.schema_of(name), arguments)) is not None:
            found.append(f"{name}({arguments!r}): {problem}")
    return found


def _not_valid(schema: dict[str, Any], arguments: str) -> str | None:
    try:
        Draft202012Validator(schema, format_checker=CHECKER).validate(json.loads(arguments))
    except (ValueError, ValidationError) as error:
        return str(error)[:200]
    return None


def _not_a_beginning(schema: dict[str, Any], arguments: str) -> str | None:
    """Return why arguments that were cut are no beginning of valid ones; half a character at their end counts for nothing."""
    try:
        constraint = _compiled(json.dumps(schema))
    except InvalidParameterError as error:
        return str(error)
    return None if begins(constraint, arguments.rstrip("\ufffd")) else "no valid arguments begin so"


@functools.lru_cache(maxsize=64)
def _compiled(schema: str) -> Any:
    return compile_here(ConstraintKind.JSON_SCHEMA, schema)
