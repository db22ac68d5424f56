"""The keywords of JSON Schema, by what becomes of them."""

from __future__ import annotations

from typing import Final

DRAFTS: Final = {
    "http://json-schema.org/draft-04/schema": 4,
    "http://json-schema.org/draft-06/schema": 6,
    "http://json-schema.org/draft-07/schema": 7,
    "https://json-schema.org/draft/2019-09/schema": 2019,
    "https://json-schema.org/draft/2020-12/schema": 2020,
}
"""Dialect -> draft; a schema that names none is of the newest."""
NEWEST_DRAFT: Final = 2020

ENFORCED: Final = frozenset(
    {
        "$ref", "additionalItems", "additionalProperties", "allOf", "anyOf", "const", "enum", "exclusiveMaximum",
        "exclusiveMinimum", "format", "items", "maxItems", "maxLength", "maxProperties", "maximum", "minItems",
        "minLength", "minProperties", "minimum", "multipleOf", "oneOf", "pattern", "patternProperties", "prefixItems",
        "properties", "required", "type",
    }
)  # fmt: skip

REFUSED: Final = {
    "$dynamicAnchor": "it belongs to $dynamicRef; use $anchor and $ref",
    "$dynamicRef": "use $ref",
    "$recursiveAnchor": "it belongs to $recursiveRef; use $ref",
    "$recursiveRef": "use $ref",
    "contains": "use items, or prefixItems",
    "dependencies": "list the combinations with anyOf",
    "dependentRequired": "list the combinations with anyOf",
    "dependentSchemas": "list the combinations with anyOf",
    "disallow": "use type",
    "divisibleBy": "use multipleOf",
    "else": "list the cases with anyOf",
    "extends": "use allOf",
    "if": "list the cases with anyOf",
    "maxContains": "use maxItems",
    "minContains": "use minItems",
    "not": "say what is allowed, with enum or anyOf",
    "nullable": 'use type: [..., "null"]',
    "propertyNames": "use patternProperties with additionalProperties: false",
    "then": "list the cases with anyOf",
    "unevaluatedItems": "use items",
    "unevaluatedProperties": "use additionalProperties",
    "uniqueItems": "leave it out and check the output",
}
"""Keywords that constrain a value and cannot be enforced -> what to do instead."""
HARMLESS: Final = {"uniqueItems": False, "nullable": False, "$recursiveAnchor": False}
"""Refused keyword -> the value with which it says nothing."""
CONTENT: Final = frozenset({"contentEncoding", "contentMediaType"})
"""Annotations that up to draft 7 may be assertions."""

IN_PLACE: Final = ("$ref", "const", "enum", "allOf", "anyOf", "oneOf")
"""What the library intersects with the rest of a schema, in the order of the text."""
SCHEMA: Final = frozenset({"additionalItems", "additionalProperties", "items"})
"""Keywords whose value is a schema; items may be a list of them."""
LIST_OF_SCHEMAS: Final = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
MAP_OF_SCHEMAS: Final = frozenset({"$defs", "definitions", "patternProperties", "properties"})
COUNTS: Final = frozenset({"maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties"})
BOUNDS: Final = ("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum")
