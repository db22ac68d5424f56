"""What llguidance documents of JSON Schema is taken here in the forms that it documents, and means what `jsonschema` says.

Source: https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md
"""

from __future__ import annotations

import itertools
import json
import random
from typing import Any, Final

import pytest
from jsonschema import Draft202012Validator, FormatChecker
from loraplex_common.errors import InvalidParameterError
from loraplex_common.structured_output import ConstraintKind
from support.constraint_rig import compile_here, takes
from support.json_schema_suite import spellings

CHECKER: Final = FormatChecker([name for name in FormatChecker.checkers if name != "time"])  # theirs has no time zones

OPTIONAL: Final = {name: {"type": "integer"} for name in "abcd"}
CLOSED: Final = {"type": "object", "properties": OPTIONAL, "additionalProperties": False}
OPEN: Final = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
MAP: Final = {"type": "object", "additionalProperties": {"type": "integer"}}
OBJECTS: Final = [
    dict.fromkeys(names, 1) for size in range(4) for names in itertools.combinations(("a", "b", "c", "x"), size)
] + [dict.fromkeys("abcd", 1)]
SCALARS: Final = [None, True, 0, 1, -3, 2.5, 7, "", "a", "red", [], [1], {}, {"a": 1}]


def _tagged(*kinds: Any) -> dict[str, Any]:
    return {"oneOf": [{"properties": {"k": {"const": kind}}, "required": ["k"], "type": "object"} for kind in kinds]}


# Keyword -> (schema, instances); those that it allows and those that it does not are both among them.
CASES: Final[dict[str, list[tuple[Any, list[Any]]]]] = {
    "anyOf": [({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]}, SCALARS)],
    "oneOf": [
        ({"oneOf": [{"type": "string"}, {"type": "integer"}, {"type": ["array", "null"]}]}, SCALARS),
        ({"oneOf": [{"const": "a"}, {"enum": ["red", 1]}, {"const": None}]}, SCALARS),
        ({"oneOf": [{"const": [1]}, {"const": []}, {"const": {"a": 1}}]}, SCALARS),
        ({"oneOf": [{"type": "integer", "maximum": 0}, {"type": "number", "exclusiveMinimum": 0}]}, SCALARS),
        ({"oneOf": [{"type": "number", "maximum": 2}, {"const": 7}]}, SCALARS),
        ({"oneOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "integer", "exclusiveMaximum": 1}]}, SCALARS),
        ({"oneOf": [{"type": "string", "maxLength": 1}, {"type": "string", "minLength": 2}]}, SCALARS),
        ({"oneOf": [{"type": "array", "maxItems": 0}, {"type": "array", "minItems": 1}]}, SCALARS),
        ({"oneOf": [{"type": "array", "minItems": 1, "items": {"type": t}} for t in ("integer", "string")]}, [[1], ["a"], []]),
        (_tagged("a", "b", 3), [{"k": "a"}, {"k": "b", "x": 1}, {"k": 3}, {"k": "c"}, {}]),
        ({"oneOf": [CLOSED | {"required": ["a"]}, {"type": "object", "required": ["x"]}]}, OBJECTS[:12]),
        (
            {"oneOf": [{"type": "object", "required": ["a"]}, {"type": "object", "properties": {"a": False}}]},
            [{}, {"a": 1}, {"b": 1}, 3],
        ),
        ({"oneOf": [MAP | {"maxProperties": 1}, MAP | {"required": ["a", "b"]}]}, OBJECTS[:12]),
        ({"type": "object", "oneOf": [{"required": ["a"], "properties": {"b": False}}, {"required": ["b"]}]}, OBJECTS[:12]),
        (
            {
                "$defs": {"n": {"type": "number"}, "small": {"allOf": [{"$ref": "#/$defs/n"}, {"maximum": 1}]}},
                "oneOf": [{"$ref": "#/$defs/small"}, {"type": "integer", "minimum": 5}],
            },
            SCALARS,
        ),
        ({"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, OBJECTS),
        ({"oneOf": [{"required": [name]} for name in "abc"]}, [*OBJECTS, 3]),
        ({"oneOf": [{"minimum": 2}, {"type": "string"}]}, SCALARS),
        ({"oneOf": [{"type": "number", "minimum": 2}, {"type": "number", "maximum": 7}, {"minLength": 2}]}, SCALARS),
        ({"oneOf": [{"properties": {"a": {"type": "null"}}}, {"properties": {"b": {"minimum": 3}}}]}, [{"a": None, "b": 3}, {"a": 1, "b": 3}, {"b": 1}, 3]),
        ({"oneOf": [True, {"type": ["null", "boolean"]}]}, SCALARS),
        ({"oneOf": [{"anyOf": [{"const": "a"}, {"type": "null"}]}, {"type": ["integer", "boolean"]}]}, SCALARS),
    ],
    "allOf": [({"allOf": [{"type": ["integer", "string"]}, {"minimum": 1}, {"minLength": 1}]}, SCALARS)],
    "$ref": [({"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}, [[], [[], [[]]], [1], 1])],
    "const": [
        ({"const": value}, SCALARS)
        for value in (None, True, 1, 2.5, "red", [1], {"a": 1})
    ] + [({"const": 2**60}, [2**60, 2**60 + 1, 2**60 - 1, -(2**60)])],
    "enum": [({"enum": [1, "a", None, [1]]}, SCALARS), ({"enum": [-(2**61), "x"]}, [-(2**61), 2**61, "x"])],
    "type": [
        *(({"type": name}, SCALARS) for name in ("null", "boolean", "integer", "number", "string", "array", "object")),
        ({"type": ["integer", "null"]}, SCALARS),
    ],
    "sibling keys": [
        ({"type": "integer", "anyOf": [{"minimum": 5}, {"maximum": -1}]}, SCALARS),
        ({"$defs": {"i": {"type": "integer"}}, "$ref": "#/$defs/i", "maximum": 1}, SCALARS),
    ],
    "items": [({"type": "array", "items": {"type": "integer"}}, [[], [1, 2], ["a"], [1, None], 3])],
    "prefixItems": [
        ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False}, [[], [1], [1, "a"], [1, 1], [1, "a", 2]]),
    ],
    "minItems": [({"type": "array", "minItems": 2}, [[], [1], [1, 2], [1, 2, 3]])],
    "maxItems": [({"type": "array", "maxItems": 1}, [[], [1], [1, 2]])],
    "properties": [(CLOSED, OBJECTS), ({"properties": {"a": {"type": "string"}}}, [{"a": "x"}, {"a": 1}, {"b": 1}, 5])],
    "additionalProperties": [(MAP, [*OBJECTS, {"a": "x"}]), ({"additionalProperties": False}, [{}, {"a": 1}, 3])],
    "patternProperties": [
        ({"patternProperties": {"^a": {"type": "integer"}, "^b": {"type": "string"}}}, [{"a": 1}, {"ab": "x"}, {"b": "x"}, {"b": 1}, {"c": 2.5}]),
    ],
    "required": [({"type": "object", "required": ["a", "x"]}, OBJECTS)],
    "minProperties": [
        ({"type": "object", "minProperties": 1}, OBJECTS),
        ({"minProperties": 1}, [*OBJECTS, 3, "a"]),
        (MAP | {"required": ["a"], "minProperties": 2}, OBJECTS),
        (OPEN | {"minProperties": 1}, OBJECTS),
        (OPEN | {"minProperties": 2, "required": ["a"]}, OBJECTS),
        *((CLOSED | {"minProperties": least}, OBJECTS) for least in range(5)),
        (CLOSED | {"minProperties": 3, "required": ["b"]}, OBJECTS),
        ({**CLOSED, "type": ["object", "null"], "minProperties": 2}, [*OBJECTS, None, 3]),
        ({"properties": OPTIONAL, "additionalProperties": False, "minProperties": 3}, [*OBJECTS, 3]),
    ],
    "maxProperties": [
        ({"type": "object", "maxProperties": 0}, OBJECTS),
        (MAP | {"maxProperties": 2}, OBJECTS),
        (MAP | {"maxProperties": 2, "required": ["x"]}, OBJECTS),
        (OPEN | {"maxProperties": 1}, OBJECTS),
        (OPEN | {"maxProperties": 3, "minProperties": 1}, OBJECTS),
        *((CLOSED | {"maxProperties": most}, OBJECTS) for most in range(5)),
        *((CLOSED | {"minProperties": least, "maxProperties": 3}, OBJECTS) for least in (1, 2, 3)),
        (CLOSED | {"maxProperties": 2, "required": ["c"]}, OBJECTS),
        ({"maxProperties": 1, "properties": OPTIONAL, "required": ["a", "b"]}, [*OBJECTS, 3, None]),
        ({"patternProperties": {"^[a-d]$": {}}, "additionalProperties": False, "maxProperties": 2}, OBJECTS),
    ],
    "minLength": [({"type": "string", "minLength": 2}, ["", "a", "ab", "äöü"])],
    "maxLength": [({"type": "string", "maxLength": 2}, ["", "ab", "äöü", "🙂🙂"])],
    "pattern": [({"type": "string", "pattern": "^[a-c]+$|7"}, ["abc", "d", "x7x", ""])],
    "minimum": [({"type": "number", "minimum": 1}, SCALARS), ({"type": "integer", "minimum": -(2**62)}, [-(2**62), -(2**62) - 1, 0])],
    "maximum": [
        ({"type": "number", "maximum": 1}, SCALARS),
        ({"type": "integer", "maximum": 2**63 - 1}, [2**63 - 1, 2**63, 2**70, 0, -(2**70)]),
        ({"type": ["integer", "null"], "maximum": 2**60, "minimum": 0}, [2**60, 2**60 + 1, -1, 5, None]),
    ],
    "exclusiveMinimum": [({"type": "number", "exclusiveMinimum": 1}, SCALARS)],
    "exclusiveMaximum": [({"type": "integer", "exclusiveMaximum": 1}, SCALARS)],
    "multipleOf": [
        ({"type": "number", "multipleOf": 0.5}, SCALARS),
        ({"type": "object", "properties": {"a": {"multipleOf": 1009}, "b": {"multipleOf": 1013}, "c": {"multipleOf": 1019}}}, [{"a": 2018, "b": 1013, "c": 0}, {"a": 1013}, {"b": 3}]),
    ],
}  # fmt: skip


def _disagreements(schema: Any, instances: list[Any], **options: Any) -> list[Any]:
    constraint = compile_here(ConstraintKind.JSON_SCHEMA, json.dumps(schema | options))
    validator = Draft202012Validator(schema, format_checker=CHECKER)
    taken = [any(takes(constraint, text) for text in spellings(instance)) for instance in instances]
    valid = [validator.is_valid(instance) for instance in instances]
    return [instance for instance, one, other in zip(instances, taken, valid, strict=True) if one != other]


@pytest.mark.parametrize("keyword", list(CASES))
def test_a_documented_keyword_holds_for_every_instance(keyword: str) -> None:
    for schema, instances in CASES[keyword]:
        assert _disagreements(schema, instances) == [], schema
    validators = [
        (Draft202012Validator(schema, format_checker=CHECKER), instances) for schema, instances in CASES[keyword]
    ]
    assert {v.is_valid(instance) for v, instances in validators for instance in instances} == {True, False}


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("date-time", "2024-02-29T12:00:00Z", "2024-02-30T12:00:00Z"),
        ("time", "12:30:00+02:00", "25:30:00+02:00"),
        ("date", "2024-02-29", "2023-02-29"),
        ("duration", "P1DT2H", "P"),
        ("email", "a@b.c", "a"),
        ("hostname", "a.example", "-a"),
        ("ipv4", "1.2.3.4", "1.2.3.400"),
        ("ipv6", "::1", ":1"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000", "123"),
        ("uri", "https://a.example/b?c", "a b"),
    ],
)
def test_a_documented_format_holds(name: str, good: str, bad: str) -> None:
    constraint = compile_here(ConstraintKind.JSON_SCHEMA, json.dumps({"format": name}))
    assert takes(constraint, json.dumps(good))
    assert not takes(constraint, json.dumps(bad))
    assert takes(constraint, "3")


def test_random_counts_of_properties_mean_what_they_say() -> None:
    names = ("a", "b", "c", "y")
    instances = [dict.fromkeys(part, 1) for size in range(5) for part in itertools.combinations(names, size)]
    num_compiled, wrong = 0, list[Any]()
    for seed in range(40):
        rng = random.Random(seed)
        listed = rng.sample(names, rng.randint(0, 4))
        schema: dict[str, Any] = {"type": rng.choice(["object", ["object", "null"]])}
        schema["properties"] = {name: rng.choice([True, {"type": "integer"}, False]) for name in listed}
        schema["required"] = [name for name in ("a", "b", "y") if rng.random() < 0.3]
        schema |= {"additionalProperties": False} if rng.random() < 0.5 else {}
        schema |= {"patternProperties": {"^[cy]$": {"type": "integer"}}} if rng.random() < 0.3 else {}
        schema |= {"minProperties": rng.randint(0, 4)} if rng.random() < 0.7 else {}
        schema |= {"maxProperties": rng.randint(0, 4)} if rng.random() < 0.7 else {}
        try:
            assert _disagreements(schema, instances) == [], schema
            num_compiled += 1
        except InvalidParameterError as error:
            if "'minProperties' at # cannot be enforced" not in error.message:
                wrong += [schema for value in [*instances, None] if Draft202012Validator(schema).is_valid(value)]
    assert wrong == []
    assert num_compiled > 25


PARTS: Final[list[Any]] = [
    True, {"type": "integer"}, {"type": "number"}, {"type": ["string", "null"]}, {"const": 1}, {"enum": [1, "a", None]},
    {"minimum": 2}, {"maximum": 1, "type": "number"}, {"exclusiveMaximum": 2, "type": "number"}, {"type": "string", "minLength": 1},
    {"type": "string", "maxLength": 0}, {"type": "array", "maxItems": 0}, {"type": "array", "items": {"type": "integer"}, "minItems": 1},
    {"type": "array", "prefixItems": [{"const": 1}], "minItems": 1}, {"required": ["a"]}, {"type": "object", "required": ["a"]},
    {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}, {"type": "object", "properties": {"a": {"type": "string"}}},
    {"type": "object", "additionalProperties": False}, {"type": "object", "maxProperties": 0}, {"type": "object", "minProperties": 1},
    {"anyOf": [{"type": "integer"}, {"const": "a"}]}, {"allOf": [{"type": "number"}, {"minimum": 3}]}, {"$ref": "#/$defs/n"},
    {"type": "boolean"}, {"const": {"a": 1}}, {"const": [1]}, {"type": "number", "multipleOf": 2},
]  # fmt: skip


def test_random_options_of_one_of_mean_exactly_one() -> None:
    instances = [*SCALARS, "b", 2, 3, 1.5, ["a"], [1, 2], {"a": "x"}, {"b": 1}, {"a": 1, "b": 2}, False]
    num_compiled, refusals = 0, list[str]()
    for options in random.Random(1).sample(list(itertools.combinations(PARTS, 2)), 120):
        schema = {"$defs": {"n": {"type": "number", "minimum": 3}}, "oneOf": list(options)}
        try:
            assert _disagreements(schema, instances) == [], schema
            num_compiled += 1
        except InvalidParameterError as error:
            refusals.append(error.message)
    assert [text for text in refusals if "'oneOf' cannot be enforced" not in text] == []
    assert num_compiled > 60


def test_one_of_may_be_taken_for_any_of_by_its_name() -> None:
    schema = {"oneOf": [{"type": "integer"}, {"minimum": 2, "type": "number"}]}
    with pytest.raises(InvalidParameterError, match="coerce_one_of"):
        compile_here(ConstraintKind.JSON_SCHEMA, json.dumps(schema))
    constraint = compile_here(ConstraintKind.JSON_SCHEMA, json.dumps(schema | {"x-guidance": {"coerce_one_of": True}}))
    assert [text for text in ("1", "3", "2.5", "1.5") if takes(constraint, text)] == ["1", "3", "2.5"]


@pytest.mark.parametrize(
    ("options", "taken", "not_taken"),
    [
        ({"whitespace_flexible": False}, ['{"a":1,"b":2}'], ['{"a": 1,"b":2}']),
        ({"whitespace_flexible": True}, ['{"a" : 1,\n "b":2}'], []),
        ({"whitespace_pattern": r"[\x20\x0A]{1,2}"}, ['{"a":  1,"b":2}'], ['{"a":   1,"b":2}', '{"a":\t1,"b":2}']),
        ({"whitespace_pattern": r"\s?"}, ['{"a": 1,\t"b":2}'], ['{"a":  1,"b":2}', '{"a":\u00a01,"b":2}']),
        (
            {"item_separator": r"\s{0,2},\s{0,2}", "key_separator": r"\s{0,2}:\s{0,2}", "whitespace_flexible": False},
            ['{"a":1,"b":2}', '{"a": 1, "b": 2}', '{"a"  :  1 , "b":2}'],
            ['{"a":1,   "b":2}'],
        ),
        ({"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}, ['{"a": 1, "b": 2}'], ['{"a":1,"b":2}']),
        ({"json_allowed_escapes": 'nrbtf\\"', "lenient": False, "coerce_one_of": False}, ['{"a":1,"b":2}'], []),
        ({"json_allow_general_unicode_escapes": False}, ['{"a":1,"b":2}'], []),
    ],
)  # fmt: skip
def test_x_guidance_says_what_form_outputs_have(options: Any, taken: list[str], not_taken: list[str]) -> None:
    schema = {"type": "object", "properties": {"a": True, "b": True}, "required": ["a", "b"], "x-guidance": options}
    constraint = compile_here(ConstraintKind.JSON_SCHEMA, json.dumps(schema))
    assert [text for text in taken if not takes(constraint, text)] == []
    assert [text for text in not_taken if takes(constraint, text)] == []
    assert all(json.loads(text) == {"a": 1, "b": 2} for text in taken)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "an object"),
        ({"lenient": True}, "lenient would let keywords be ignored"),
        ({"whitespace": ""}, "'whitespace' is not known"),
        ({"coerce_one_of": 1}, "coerce_one_of is true or false"),
        ({"whitespace_pattern": "x*"}, "whitespace_pattern is made of blanks"),
        ({"whitespace_pattern": "[ x]"}, "whitespace_pattern is made of blanks"),
        ({"whitespace_pattern": " {3,1}"}, "a repetition of 3 to 1"),
        ({"item_separator": " "}, "item_separator must have one ','"),
        ({"item_separator": ",,"}, "item_separator is made of blanks"),
        ({"key_separator": "="}, "key_separator must have one ':'"),
        ({"json_allowed_escapes": "nu"}, "spelt around its schema"),
        ({"json_allow_general_unicode_escapes": True}, "spelt around its schema"),
    ],
)
def test_x_guidance_cannot_make_outputs_that_are_no_json_or_do_not_fit(options: Any, reason: str) -> None:
    with pytest.raises(InvalidParameterError, match=f"keyword 'x-guidance'.*{reason}"):
        compile_here(ConstraintKind.JSON_SCHEMA, json.dumps({"type": "object", "x-guidance": options}))


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (MAP | {"minProperties": 2}, "require the names, or list them"),
        ({**CLOSED, "properties": {f"p{n}": {} for n in range(12)}, "minProperties": 6}, "924 combinations"),
        ({"allOf": [{"properties": {"z": {}}}, OPEN | {"minProperties": 1}]}, "list those under the same properties"),
        ({"maximum": 2**60}, "keyword 'maximum' at #"),
        ({"type": "integer", "maximum": 2**64}, "keyword 'maximum' at #"),
        ({"type": "integer", "exclusiveMaximum": 2**63 - 1}, "keyword 'exclusiveMaximum' at #"),
        ({"type": "integer", "minimum": 2**60}, "keywords 'minimum' and 'maximum' cannot be enforced"),
        ({"type": "object", "properties": {f"p{n}": {"type": "null"} for n in range(600)}}, "require the properties, with types that take null"),
        ({"properties": {f"p{n}": {} for n in range(1500)}}, "some 490 optional 'properties'"),
        ({"const": 2**63}, "keyword 'const' at #"),
        ({"const": 2**60 + 1}, "keyword 'const' at #"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused_with_a_remedy(schema: Any, reason: str) -> None:
    with pytest.raises(InvalidParameterError, match=reason):
        compile_here(ConstraintKind.JSON_SCHEMA, json.dumps(schema))
