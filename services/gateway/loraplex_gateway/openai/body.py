"""From the bytes of a request's body to a struct of `schema`, with every field accounted for by `fields`."""

from __future__ import annotations

import difflib
import functools
import gc
import itertools
import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar, get_args, get_type_hints

import msgspec
from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.openai.errors import BodyError
from loraplex_gateway.openai.fields import CHAT, COMPLETION, WHICH_MODEL, Rule
from loraplex_gateway.openai.schema import ChatBody, CompletionBody
from loraplex_gateway.requests.validation import MAX_VIOLATIONS_TOLD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_gateway.openai.fields import Field, Table

Body = TypeVar("Body", bound=msgspec.Struct)
Object = TypeVar("Object", bound=msgspec.Struct)
Violation = tuple[str, str, str]
"""A field, what is wrong with it, and OpenAI's code for that."""

BODIES: Final[dict[type[msgspec.Struct], Table]] = {ChatBody: CHAT, CompletionBody: COMPLETION}
"""The table of each kind of body; a further endpoint adds its own."""

# Names are quoted in messages and compared with ours: no field of the API is longer.
MAX_FIELD_CHARS: Final = 64
LONG_CHARS: Final = 256 * 1024
# From here on a float stands for several integers.
MAX_EXACT: Final = 2**53
_MISSING: Final = re.compile(r"Object missing required field `(\w+)`?")
_REMEDIES: Final = {"model": f": {WHICH_MODEL}"}
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")


def decode(data: bytes, body: type[Body], table: Table | None = None) -> Body:
    """Read a request body by a table, by default that of its type. Null means absent.

    Raises:
        InvalidParameterError: If it is no JSON object, or a field is unknown, not served, missing or of a wrong type;
            with one violation per field.
    """
    members, table = _read(data), table or BODIES[body]
    _check(members, table, "")
    return _convert(_served(members, table), body, table)


def read_object(value: dict[str, Any], struct: type[Object], table: Table, where: str) -> Object:
    """Read an object inside a body by the table of its kind.

    Args:
        value: What the body has there.
        struct: The served fields with their types.
        table: What becomes of each field.
        where: Its path in the body.

    Raises:
        InvalidParameterError: As `decode`, with the whole path of each field.
    """
    _check(value, table, f"{where}.")
    return _convert(_served(value, table), struct, table, f"{where}.")


def _check(members: dict[str, Any], table: Table, path: str) -> None:
    # No more than are told: a body may have a million unknown names.
    found = list(itertools.islice(_violations(members, table, path, members), MAX_VIOLATIONS_TOLD))
    if found:
        told = [(field, text) for field, text, _ in found]
        raise BodyError("; ".join(text for _, text in told), openai_code=found[0][2], violations=told)


def _read(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode()
        members = _parsed(text)
    except RecursionError:
        raise InvalidParameterError("the body is nested too deeply", field="body") from None
    except ValueError as error:  # no UTF-8, no JSON, an integer of thousands of digits
        raise InvalidParameterError(f"the body is no valid JSON in UTF-8: {error}", field="body") from error
    if not isinstance(members, dict):
        raise InvalidParameterError("the body must be a JSON object", field="body")
    if _SURROGATE.search(text):
        for name, value in members.items():
            _check_unicode(name, value)
    return members


def _parsed(text: str) -> Any:
    """Parse JSON; of long texts without the garbage collector.

    It would look at all that there is again and again while a million small lists come into being, with the interpreter's
    lock in its hands. Another thread may turn it on in between, which costs time alone.
    """
    if len(text) < LONG_CHARS:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    gc.disable()
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    finally:
        gc.enable()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object, each name of which must be there once: a proxy may have looked at the other value."""
    members = dict(pairs)
    if len(members) != len(pairs):
        name = _quotable(Counter(name for name, _ in pairs).most_common(1)[0][0])
        raise InvalidParameterError(f"{name} is there more than once; send it once", field=name)
    return members


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _check_unicode(name: str, value: Any) -> None:
    try:
        msgspec.json.encode([name, value])
    except UnicodeEncodeError as error:
        field = _quotable(name)
        raise InvalidParameterError(
            f"{field} is no valid Unicode: lone surrogates cannot be encoded as UTF-8", field=field
        ) from error


def _violations(members: dict[str, Any], table: Table, path: str, body: dict[str, Any]) -> Iterator[Violation]:
    """Yield what is wrong with the fields of an object and of those inside it."""
    for name, value in members.items():
        if value is None:
            continue
        field = table.fields.get(name)
        where = f"{path}{_quotable(name)}"
        if field is None:
            yield where, f"unknown field {where}{_suggestion(name, table)}", "unknown_parameter"
        elif field.rule is Rule.REFUSED and not _is_harmless(value, field, body):
            code = "unsupported_value" if field.harmless or field.same_as else "unsupported_parameter"
            yield where, f"{where} is not supported: {field.note}", code
        elif name in table.nested:
            for suffix, inner in _objects_in(value):
                yield from _violations(inner, table.nested[name], f"{where}{suffix}.", body)


def _is_harmless(value: Any, field: Field, body: dict[str, Any]) -> bool:
    harmless = field.harmless
    if field.same_as:
        other = body.get(field.same_as)
        other = field.default if other is None else other
        harmless = () if other is None else (other,)
    # To Python true is 1; to JSON it is not.
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in harmless)


def _objects_in(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (index, object) for an object or a list of objects; types are checked later."""
    if isinstance(value, dict):
        yield "", value
    elif isinstance(value, list):
        for n, item in enumerate(value):
            if isinstance(item, dict):
                yield f"[{n}]", item


def _suggestion(name: str, table: Table) -> str:
    served = [field.name for field in table.fields.values() if field.rule is Rule.SERVED]
    close = difflib.get_close_matches(name, served, n=1, cutoff=0.75) if len(name) <= MAX_FIELD_CHARS else []
    return f"; did you mean {close[0]}?" if close else "; leave it out"


def _served(members: dict[str, Any], table: Table) -> dict[str, Any]:
    """Return what is left for the struct: served fields that have a value."""
    served = {}
    for name, value in members.items():
        if value is None or table.fields[name].rule is not Rule.SERVED:
            continue
        inner = table.nested.get(name)
        served[name] = value if inner is None else _served_inside(value, inner)
    return served


def _served_inside(value: Any, table: Table) -> Any:
    if isinstance(value, list):
        return [_served(item, table) if isinstance(item, dict) else item for item in value]
    return _served(value, table) if isinstance(value, dict) else value


def _convert(members: dict[str, Any], struct: type[Object], table: Table, prefix: str = "") -> Object:
    try:
        try:
            return msgspec.convert(members, struct)
        except msgspec.ValidationError:
            return msgspec.convert(_with_integers(members, struct), struct)
    except msgspec.ValidationError as error:
        what, _, path = str(error).rstrip("`").partition(" - at `$.")
        missing = _MISSING.fullmatch(what)
        field = f"{path}.{missing[1]}".lstrip(".") if missing else path
        known = table.fields.get(field)
        values = f"; {known.note}" if known and what.startswith("Invalid enum value") else ""
        remedy = "" if prefix else _REMEDIES.get(field, "")
        text = f"{prefix}{field} is missing{remedy}" if missing else f"{prefix}{field}: {what}{values}"
        code = "missing_required_parameter" if missing else "invalid_type"
        code = "invalid_value" if what.startswith("Invalid enum value") else code
        raise BodyError(text.replace("`", ""), openai_code=code, field=f"{prefix}{field}") from error


def _with_integers(members: dict[str, Any], struct: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the members with 1 in place of 1.0 where the struct has integers: to JSON both are the same number."""
    kinds = _integer_fields(struct)
    return {name: _integer(value, in_lists=kinds[name]) if name in kinds else value for name, value in members.items()}


def _integer(value: Any, *, in_lists: bool) -> Any:
    if in_lists and isinstance(value, list):
        return [_integer(item, in_lists=False) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < MAX_EXACT:
        return int(value)
    return value


@functools.cache
def _integer_fields(struct: type[msgspec.Struct]) -> dict[str, bool]:
    """Return the fields that hold integers and no other numbers; True for lists of them."""
    found = {}
    for name, hint in get_type_hints(struct).items():
        kinds = {hint, *get_args(hint)}
        if float not in kinds and not kinds.isdisjoint((int, list[int])):
            found[name] = list[int] in kinds
    return found


def _quotable(name: str) -> str:
    shown = name if len(name) <= MAX_FIELD_CHARS else name[:MAX_FIELD_CHARS] + "..."
    return shown.encode(errors="replace").decode()
