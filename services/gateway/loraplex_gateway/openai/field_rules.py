"""How a table of body fields is written."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any


class Rule(enum.Enum):
    """What becomes of a field that has a value."""

    SERVED = "served"
    IGNORED = "accepted and ignored"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a JSON object. Null is as if it were absent, whatever the rule.

    Attributes:
        name: Its key.
        note: What it does, why ignoring it does no harm, or why it is refused and what to do instead.
        harmless: Values of a refused field that ask for nothing, and so pass.
        same_as: Name of another field whose value is harmless too.
        default: What the other field is if absent; None if it then has no value.
        core: Names under which the gateway's other parts report errors of this field.
    """

    name: str
    rule: Rule
    note: str
    harmless: tuple[Any, ...] = ()
    same_as: str = ""
    default: int | None = None
    core: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """The fields of one kind of JSON object.

    Attributes:
        name: What the object is, for people.
        fields: By key.
        nested: Tables of the objects inside, by the key of the field that holds one or a list of them.
    """

    name: str
    fields: dict[str, Field]
    nested: dict[str, Table]


def served(name: str, note: str, *core: str) -> Field:
    """Return a field that is served; errors of `core` are errors of it."""
    return Field(name, Rule.SERVED, note, core=core)


def ignored(names: str, note: str) -> tuple[Field, ...]:
    """Return fields, separated by blanks, that are ignored."""
    return tuple(Field(name, Rule.IGNORED, note) for name in names.split())


def refused(names: str, note: str, *harmless: Any) -> tuple[Field, ...]:
    """Return fields, separated by blanks, that are refused unless they have a harmless value."""
    return tuple(Field(name, Rule.REFUSED, note, harmless) for name in names.split())


def table(name: str, *fields: Field, **nested: Table) -> Table:
    """Return the table of an object's fields."""
    return Table(name, {field.name: field for field in fields}, nested)
