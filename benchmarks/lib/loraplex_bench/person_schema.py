"""A JSON Schema whose strings and numbers are bounded, so that outputs of random weights meet every part of it."""

from __future__ import annotations

from typing import Final

PERSON: Final = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": 999_999},
        "kind": {"enum": ["customer", "supplier", "partner"]},
        "name": {"type": "string", "maxLength": 40},
        "email": {"type": "string", "pattern": "^[a-z]{3,12}@[a-z]{3,12}\\.(com|org|net)$"},
        "score": {"type": "integer", "minimum": -1000, "maximum": 1000},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 5},
        "is_active": {"type": "boolean"},
    },
    "required": ["id", "kind", "name", "email", "score", "tags", "is_active"],
    "additionalProperties": False,
}
SCHEMA: Final = {
    "type": "array",
    "minItems": 100_000,
    "items": PERSON,
    "x-guidance": {"whitespace_flexible": False},
}
"""No output of the benchmark completes it, so all rows run equally long; without blanks, of which random weights write many."""
