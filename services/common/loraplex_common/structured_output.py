"""What an output must look like, as gateway and engine hand it to each other."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class ConstraintKind(enum.Enum):
    """How a constraint is written; values are the names in `loraplex.v1.StructuredOutput`."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"
    STRUCTURAL_TAG = "structural_tag"


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutput:
    """A constraint on an output.

    Attributes:
        kind: How it is written.
        text: The schema, regular expression, grammar or tag; the JSON list of a choice's texts; empty for any object.
        starts_after: Token ids after which the constraint holds; empty: from the first token on.
    """

    kind: ConstraintKind
    text: str = ""
    starts_after: tuple[int, ...] = ()
