"""Checks that each $ref of a schema points to what has been made ready for the library, and nothing else."""

from __future__ import annotations

import re
from typing import Any, NamedTuple
from urllib.parse import unquote

from loraplex_engine.constraints.json_text import ConstraintTextError


class Reference(NamedTuple):
    """A $ref of a schema.

    Attributes:
        target: Its value.
        place: Where it is.
        base: Place of the schema that a target within the same document starts from.
    """

    target: Any
    place: str
    base: str


def check_references(references: list[Reference], prepared: Any, places: set[str], *, has_ids: bool) -> None:
    """Check all references of a schema.

    Args:
        references: What is checked.
        prepared: The schema as the library reads it.
        has_ids: Whether the schema has documents of its own, named by $id.
        places: Where (sub)schemas are that have been made ready, as JSON pointers with a leading #.

    Raises:
        ConstraintTextError: If one points to no schema, or to one that looks otherwise by now.
    """
    for target, place, base in references:
        if not isinstance(target, str):
            raise ConstraintTextError(f"keyword '$ref' at {place} must have a text")
        pointer = unquote(target)
        document, _, fragment = pointer.partition("#")
        if document and (not has_ids or re.match("https?://json-schema[.]org/", document)):
            raise _unsupported(place, "it points to another document, which is not read")
        if not fragment.startswith("/"):
            continue  # "#", an anchor or another document: the library finds it among the schema's own, or refuses it
        if document:
            raise _unsupported(place, "use #/... within the same text")
        if base + fragment not in places or not _resolves(prepared, base + fragment):
            raise _unsupported(place, f"there is no schema at {target}; put it under $defs")


def _resolves(schema: Any, pointer: str) -> bool:
    found = schema
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list):
            if not key.isdecimal() or int(key) >= len(found):
                return False
            found = found[int(key)]
        elif isinstance(found, dict) and key in found:
            found = found[key]
        else:
            return False
    return True


def _unsupported(place: str, remedy: str) -> ConstraintTextError:
    return ConstraintTextError(f"keyword '$ref' at {place} cannot be enforced: {remedy}")
