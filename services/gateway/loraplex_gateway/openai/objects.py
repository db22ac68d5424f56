"""JSON objects that say by `type` what they are: items, content parts, content blocks, tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.openai.body import read_object
from loraplex_gateway.openai.fields import Table

if TYPE_CHECKING:
    from collections.abc import Sequence


MAX_TYPE_CHARS = 64
Object = TypeVar("Object", bound=msgspec.Struct)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One type of object: the table of its fields and the struct of those that are served."""

    table: Table
    struct: type[msgspec.Struct]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kinds:
    """The types that an object may have.

    Attributes:
        name: What such an object is called in messages: ``item``, ``block``.
        served: By type.
        refused: Why a type is not served and what to do instead, by type.
        others: The same for all other types.
        default: Type of an object that names none; empty where it must.
    """

    name: str
    served: Mapping[str, Kind]
    refused: Mapping[str, str] = field(default_factory=dict)
    others: str
    default: str = ""


def read_all(values: Sequence[Any], kinds: Kinds, where: str) -> list[msgspec.Struct]:
    """Return the structs of a list of objects.

    Raises:
        InvalidParameterError: With the path of the first object that is not served, or of what is wrong in it.
    """
    return [read(value, kinds, f"{where}[{n}]") for n, value in enumerate(values)]


def read(value: Any, kinds: Kinds, where: str) -> msgspec.Struct:
    """Return the struct of one object.

    Args:
        value: What the body has.
        kinds: The types that it may have.
        where: Its path in the body.

    Raises:
        InvalidParameterError: As `read_all`.
    """
    if not isinstance(value, dict):
        raise InvalidParameterError(f"{where} must be an object", field=where)
    named = value.get("type")
    kind = kinds.default if named is None else named
    if not isinstance(kind, str) or not kind:
        raise InvalidParameterError(f"{where}.type is missing, or no string", field=f"{where}.type")
    if (known := kinds.served.get(kind)) is not None:
        return read_object(value, known.struct, known.table, where)
    note = kinds.refused.get(kind, kinds.others)
    shown = kind[:MAX_TYPE_CHARS]
    raise InvalidParameterError(
        f"{where}.type is not supported: {kinds.name}s of type {shown!r} are not served; {note}", field=f"{where}.type"
    )
