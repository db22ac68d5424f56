"""What a body says about the form of its output, under the names of OpenAI, of vLLM and of older vLLM.

Exactly one constraint can hold. Whether a schema is strict makes no difference: what does not fit is never drawn.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import InvalidParameterError
from loraplex_common.structured_output import ConstraintKind, StructuredOutput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_gateway.openai.schema import CommonBody, ResponseFormat

FORMATS: Final = "text, json_object, json_schema and structural_tag"
# Names inside structured_outputs, and those of its fields that older clients send at the top.
_KINDS: Final = {
    "json": ConstraintKind.JSON_SCHEMA,
    "regex": ConstraintKind.REGEX,
    "choice": ConstraintKind.CHOICE,
    "grammar": ConstraintKind.GRAMMAR,
    "structural_tag": ConstraintKind.STRUCTURAL_TAG,
}
_GUIDED: Final = ("json", "regex", "choice", "grammar")


@dataclass(frozen=True, slots=True)
class _Sent:
    """A constraint as the body has it; `field` is its path, ``response_format.json_schema.schema`` for a schema."""

    field: str
    kind: ConstraintKind
    value: Any = ""


def structured_output(body: CommonBody) -> StructuredOutput | None:
    """Return what the output must look like; None if it is free.

    Raises:
        InvalidParameterError: If there are several constraints, or one is of a wrong type; the field is named.
    """
    found = list(_sent(body))
    if len(found) > 1:
        first, second = found[0].field, found[1].field
        raise InvalidParameterError(f"{second} and {first} both constrain the output; send one of them", field=second)
    if found:
        return StructuredOutput(kind=found[0].kind, text=_text(found[0]))
    if body.structured_outputs is not None:
        raise InvalidParameterError(
            f"structured_outputs holds no constraint; set one of {', '.join(_KINDS)} and json_object, or leave it out",
            field="structured_outputs",
        )
    return None


def constraint_field(body: CommonBody) -> str:
    """Return the path of the field that constrains the output, for errors of the constraint; empty if none does."""
    return next((sent.field for sent in _sent(body)), "")


def _sent(body: CommonBody) -> Iterator[_Sent]:
    if body.response_format is not None:
        yield from _of_response_format(body.response_format)
    if (outputs := body.structured_outputs) is not None:
        if outputs.json_object:
            yield _Sent("structured_outputs.json_object", ConstraintKind.JSON_OBJECT)
        for name, kind in _KINDS.items():
            if (value := getattr(outputs, name)) is not None:
                yield _Sent(f"structured_outputs.{name}", kind, value)
    for name in _GUIDED:
        if (value := getattr(body, f"guided_{name}")) is not None:
            yield _Sent(f"guided_{name}", _KINDS[name], value)


def _of_response_format(wanted: ResponseFormat) -> Iterator[_Sent]:
    parts = {name: getattr(wanted, name) for name in ("format", "structures", "triggers")}
    tag = {name: value for name, value in parts.items() if value is not None}
    if wanted.type != "json_schema" and wanted.json_schema is not None:
        raise _misplaced("json_schema", "json_schema")
    if wanted.type != "structural_tag" and tag:
        raise _misplaced(next(iter(tag)), "structural_tag")
    if wanted.type == "json_object":
        yield _Sent("response_format", ConstraintKind.JSON_OBJECT)
    elif wanted.type == "json_schema":
        if wanted.json_schema is None:
            field = "response_format.json_schema"
            raise InvalidParameterError(f"{field} is missing: it has the schema", field=field)
        yield _Sent("response_format.json_schema.schema", ConstraintKind.JSON_SCHEMA, wanted.json_schema.schema)
    elif wanted.type == "structural_tag":
        yield _Sent("response_format", ConstraintKind.STRUCTURAL_TAG, {"type": wanted.type, **tag})
    elif wanted.type != "text":
        field = "response_format.type"
        raise InvalidParameterError(f"{field} {wanted.type[:64]!r} is not supported; {FORMATS} are", field=field)


def _misplaced(name: str, kind: str) -> InvalidParameterError:
    field = f"response_format.{name}"
    return InvalidParameterError(f"{field} goes with type {kind} only", field=field)


def _text(sent: _Sent) -> str:
    """Return a constraint as text: schemas and tags may be sent as JSON or as its text."""
    if isinstance(sent.value, str):
        return sent.value
    if not isinstance(sent.value, dict | list | bool):
        raise InvalidParameterError(f"{sent.field} must be a JSON object, or its text", field=sent.field)
    try:
        return json.dumps(sent.value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise InvalidParameterError(f"{sent.field} is nested too deeply", field=sent.field) from None
