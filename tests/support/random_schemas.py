"""Random JSON Schemas of the keywords that are enforced, small enough that outputs end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

PATTERNS = ("^[a-c]{1,4}$", "^\\d{2,3}-[A-Z]$", "^(red|green)?$", "x", "^\\w{0,3} ?$", '^[^a-z"]{1,2}$')
FORMATS = ("date", "date-time", "time", "ipv4", "ipv6", "uuid", "email")
NAMES = ("a", "id", "näme", 'quote"d', "two words", "x/y")


def random_schema(rng: Random, depth: int = 2) -> Any:
    """Return a schema; most have values that are short, none has a keyword that is refused by design."""
    makers: list[Callable[[Random, int], Any]] = [_boolean, _integer, _number, _string, _choice, _constant]
    if depth > 0:
        makers += [random_object, random_object, _array, _union, _intersection, _reference]
    return rng.choice(makers)(rng, depth)


def _boolean(rng: Random, _depth: int) -> Any:
    return rng.choice([{"type": "boolean"}, {"type": ["boolean", "null"]}, {"type": "null"}])


def _integer(rng: Random, _depth: int) -> Any:
    low = rng.randint(-300, 300)
    return rng.choice(
        [
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)},
            {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + rng.randint(2, 50)},
            {"type": "integer", "multipleOf": rng.randint(1, 12), "minimum": 0, "maximum": 999},
            {"type": "integer", "format": "int8"},
        ]
    )


def _number(rng: Random, _depth: int) -> Any:
    low = rng.choice([-10, -0.5, 0, 0.25, 3])
    return {
        "type": "number",
        "minimum": low,
        rng.choice(["maximum", "exclusiveMaximum"]): low + rng.choice([1, 2.5, 40]),
    }


def _string(rng: Random, _depth: int) -> Any:
    return rng.choice(
        [
            {"type": "string", "maxLength": rng.randint(0, 8)},
            {"type": "string", "minLength": 2, "maxLength": 5},
            {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 9},
            {"type": "string", "format": rng.choice(FORMATS), "maxLength": 40},
        ]
    )


def _choice(rng: Random, _depth: int) -> Any:
    values = ["red", "", "ü", 'say "hi"', 0, 7, -2.5, True, None, [1, "a"], {"k": False}]
    return {"enum": rng.sample(values, rng.randint(1, 5))}


def _constant(rng: Random, _depth: int) -> Any:
    return {"const": rng.choice(["fixed", 12, False, None, {"n": [1, {"m": "x"}]}, ["a", 2]])}


def random_object(rng: Random, depth: int) -> dict[str, Any]:
    """Return the schema of an object."""
    names = rng.sample(NAMES, rng.randint(0, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: random_schema(rng, depth - 1) for name in names}}
    schema["required"] = [name for name in names if rng.random() < 0.7]
    more = rng.random()
    if more < 0.6:
        schema["additionalProperties"] = False
    elif more < 0.8:
        schema |= {"additionalProperties": random_schema(rng, 0), "required": names, "maxProperties": len(names) + 1}
    else:
        schema |= {"patternProperties": {"^p[0-9]$": random_schema(rng, 0)}, "additionalProperties": False}
        schema |= {"required": names, "maxProperties": len(names) + 2}
    return schema


def _array(rng: Random, depth: int) -> Any:
    if rng.random() < 0.4:
        items = [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": rng.randint(0, len(items))}
    low = rng.randint(0, 2)
    return {
        "type": "array",
        "items": random_schema(rng, depth - 1),
        "minItems": low,
        "maxItems": low + rng.randint(0, 2),
    }


def _union(rng: Random, depth: int) -> Any:
    if rng.random() < 0.5:
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    options = [
        {
            "type": "object",
            "properties": {"kind": {"const": kind}, "value": random_schema(rng, depth - 1)},
            "required": ["kind", "value"],
            "additionalProperties": False,
        }
        for kind in rng.sample(["one", "two", "three"], 2)
    ]
    return {"oneOf": options}


def _intersection(rng: Random, depth: int) -> Any:
    properties = {"a": {"type": "integer"}, "b": random_schema(rng, depth - 1)}
    bounds = {"a": {"minimum": 1, "maximum": 30}, "b": True}
    more = {"required": ["a"], "additionalProperties": {"type": "null"}, "maxProperties": 4}
    return {
        "allOf": [{"type": "object", "properties": properties, "required": ["a", "b"]}, {"properties": bounds} | more]
    }


def _reference(rng: Random, depth: int) -> Any:
    return {
        "$defs": {"part": random_schema(rng, depth - 1)},
        "type": "array",
        "prefixItems": [{"type": "boolean"}, random_schema(rng, 0)],
        "items": False,
        "minItems": 2,
    }


def recursive_schema() -> Any:
    """Return the schema of a tree."""
    node = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 3},
            "left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
        },
        "required": ["name", "left"],
        "additionalProperties": False,
    }
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}
