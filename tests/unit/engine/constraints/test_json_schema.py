"""What is rewritten in a schema before the library sees it, and what is refused by its keyword's name."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker
from loraplex_common.errors import InvalidParameterError
from loraplex_common.structured_output import ConstraintKind
from loraplex_engine.constraints import keywords
from loraplex_engine.constraints.json_schema import prepare_schema
from loraplex_engine.constraints.json_text import ConstraintTextError
from loraplex_engine.constraints.limits import MAX_JSON_BLANKS, MAX_LITERAL_BYTES
from support.constraint_rig import compile_here, small_vocabulary, takes, walk
from support.random_schemas import random_schema

if TYPE_CHECKING:
    from loraplex_engine.constraints.matcher import GrammarConstraint

CHECKER = FormatChecker([name for name in FormatChecker.checkers if name != "time"])  # theirs has no time zones


def _compile(schema: Any) -> GrammarConstraint:
    return compile_here(ConstraintKind.JSON_SCHEMA, json.dumps(schema))


def _refusal(schema: Any) -> str:
    with pytest.raises(InvalidParameterError) as refusal:
        _compile(schema)
    return refusal.value.message


@pytest.mark.parametrize("keyword", sorted(keywords.REFUSED))
def test_a_keyword_that_cannot_be_enforced_is_refused_by_name_wherever_it_is(keyword: str) -> None:
    nested = {"type": "object", "properties": {"a": {"anyOf": [{"type": "string"}, {keyword: {"type": "string"}}]}}}
    assert f"json_schema: keyword '{keyword}' at #/properties/a/anyOf/1" in _refusal(nested)


@pytest.mark.parametrize("keyword", sorted(keywords.REFUSED))
def test_a_property_or_a_value_that_is_called_like_a_keyword_is_none(keyword: str) -> None:
    schema = {"properties": {keyword: {"const": {keyword: 1}}}, "required": [keyword], "default": {keyword: 1}}
    assert takes(_compile(schema), json.dumps({keyword: {keyword: 1}}))


@pytest.mark.parametrize(
    ("schema", "part"),
    [
        ({"type": "string", "format": "iri"}, "keyword 'format' at #"),
        ({"pattern": "(?=a)"}, "keyword 'pattern' at #"),
        ({"patternProperties": {"a\\b": {}}}, "keyword 'patternProperties' at #"),
        ({"patternProperties": {"^a": {}, "b$": {}}}, "keyword 'patternProperties'"),
        ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, "keyword 'oneOf'"),
        ({"$ref": "http://example.com/a.json"}, "keyword '$ref' at #"),
        ({"$ref": "#/examples/0", "examples": [{"format": "iri"}]}, "keyword '$ref' at #"),
        ({"$ref": "#nowhere"}, "keyword '$ref'"),
        ({"$schema": "https://example.com/dialect"}, "keyword '$schema'"),
        ({"const": 2**53 + 1}, "keyword 'const' at #"),
        ({"maximum": 1e300}, "keyword 'maximum' at #"),
        ({"enum": ["x" * (MAX_LITERAL_BYTES + 1)]}, "keyword 'enum' at #"),
        ({"const": "a\x00b"}, "keyword 'const' at #"),
        ({"minLength": 1.5}, "keyword 'minLength' at #"),
        ({"type": "text"}, "keyword 'type' at #"),
        ({"required": "a"}, "keyword 'required' at #"),
        ({"minProperties": 2}, "keyword 'minProperties' at #"),
        ({"allOf": [{"multipleOf": 65521}, {"multipleOf": 65537}]}, "keyword 'multipleOf'"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "keyword 'x-guidance'"),
        ({"prefixItems": [{}], "additionalItems": False}, "keyword 'prefixItems' at #"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "contentEncoding": "base64"}, "'contentEncoding' at #"),
        ({"properties": {"a": {"type": "string"}, "b": 3}}, "the schema at #/properties/b"),
    ],
)
def test_what_would_be_read_otherwise_is_refused_with_its_keyword(schema: Any, part: str) -> None:
    assert part in _refusal(schema)


def test_a_schema_with_the_text_of_a_special_token_is_refused_without_a_rule_that_the_request_has_not() -> None:
    assert _refusal({"allOf": [{"const": "<|im_start|>"}, {"type": "null"}]}).startswith(
        "json_schema: no value satisfies"
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '"string"', "false", '{"maximum": NaN}', "[" * 100_000, '{"a":' * 70 + "1"]
)
def test_what_is_no_schema_is_refused(text: str) -> None:
    with pytest.raises(ConstraintTextError):
        prepare_schema(text)


def test_a_boolean_schema_and_one_without_a_type_allow_any_value() -> None:
    for schema in (True, {}, {"title": "anything"}):
        constraint = _compile(schema)
        assert all(takes(constraint, text) for text in ("1", '"a"', "[1,{}]", "null", '{"a":[true]}'))


def test_a_name_cannot_be_spelled_with_escapes_to_get_around_its_schema() -> None:
    constraint = _compile({"type": "object", "properties": {"a": {"type": "integer"}}})
    assert takes(constraint, '{"b":"x"}')
    assert not takes(constraint, '{"a":"x"}')
    assert not takes(constraint, '{"\\u0061":"x"}')  # json.loads reads it as "a"


def test_blanks_may_stand_where_json_allows_them_but_not_for_ever() -> None:
    constraint = _compile({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    assert takes(constraint, json.dumps({"a": 1}, indent=4))
    assert takes(constraint, "{" + " " * MAX_JSON_BLANKS + '"a":1}')
    assert not takes(constraint, "{" + " " * (MAX_JSON_BLANKS + 1) + '"a":1}')
    assert not takes(constraint, ' {"a":1}')


def test_a_schema_may_ask_for_json_without_blanks() -> None:
    schema = {"x-guidance": {"whitespace_flexible": False}, "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    constraint = _compile(schema)
    assert takes(constraint, '{"a":1}')
    assert not takes(constraint, '{"a": 1}')


def test_properties_come_in_the_schemas_order_and_those_of_its_parts_after_them() -> None:
    schema = {
        "allOf": [{"properties": {"c": {"const": 3}}, "required": ["c"]}],
        "properties": {"b": {"const": 2}, "a": {"const": 1}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    schema["properties"]["c"] = True  # type: ignore[index]
    constraint = _compile(schema)
    assert takes(constraint, '{"b":2,"a":1,"c":3}')
    assert not takes(constraint, '{"a":1,"b":2,"c":3}')


def test_items_after_a_list_of_items_are_bound_whatever_stands_between() -> None:
    schema = {"items": [{"type": "integer"}], "allOf": [{"maxItems": 3}], "additionalItems": False, "type": "array"}
    constraint = _compile({"$schema": "http://json-schema.org/draft-07/schema#", **schema})
    assert takes(constraint, "[1]")
    assert not takes(constraint, "[1,2]")


def test_options_that_a_required_value_tells_apart_are_one_of() -> None:
    options = {
        name: {
            "type": "object",
            "properties": {"kind": {"const": name}, name: {"type": "integer"}},
            "required": ["kind"],
        }
        for name in ("cat", "dog")
    }
    schema = {"$defs": options, "oneOf": [{"$ref": f"#/$defs/{name}"} for name in options], "discriminator": {}}
    constraint = _compile(schema)
    assert takes(constraint, '{"kind":"cat","cat":3}')
    assert takes(constraint, '{"kind":"dog","dog":4}')
    assert not takes(constraint, '{"kind":"cow"}')


@pytest.mark.parametrize(
    ("schema", "taken", "not_taken"),
    [
        ({"format": "date"}, ['"2024-02-29"', '"1999-12-31"'], ['"2023-02-29"', '"1900-02-29"', '"0000-01-01"']),
        ({"format": "time"}, ['"23:59:60Z"', '"01:29:60+01:30"'], ['"22:59:60Z"', '"01:29:60+01:45"']),
        ({"format": "ipv6"}, ['"::ffff:1.2.3.4"', '"::"', '"1:2::8"'], ['"1:2:3:4:5:6:7::8:9"', '":1"']),
        ({"format": "email"}, ['"a.b@c.de"'], ['"a@"', '"@a"']),
        ({"type": "integer", "format": "int8"}, ["127", "-128"], ["128", "1.0"]),
        ({"type": ["integer", "string"], "format": "uint8"}, ["255", '"x"'], ["-1", "256"]),
        ({"type": "integer", "format": "int64"}, ["123456789012"], ["0.5"]),
        ({"minLength": 2.0, "type": "string"}, ['"ab"'], ['"a"']),
        ({"const": 'say "hi"\n\\'}, [json.dumps('say "hi"\n\\')], ['"say"']),
        ({"multipleOf": 0.01, "type": "number"}, ["0.75", "-3"], ["0.755"]),
        ({"exclusiveMinimum": True, "minimum": 3, "type": "integer", "maximum": 5}, ["4"], ["3"]),
    ],
)
def test_values_are_what_the_keyword_says(schema: Any, taken: list[str], not_taken: list[str]) -> None:
    constraint = _compile(schema)
    assert [text for text in taken if not takes(constraint, text)] == []
    assert [text for text in not_taken if takes(constraint, text)] == []


def test_whatever_ends_is_valid_for_random_schemas() -> None:
    num_ended = 0
    for seed in range(120):
        rng = random.Random(seed)
        schema = random_schema(rng)
        state = _compile(schema).start(())
        text = small_vocabulary().tokenizer.decode_str(list(walk(state, rng, max_tokens=250)))
        if takes(_compile(schema), text):
            num_ended += 1
            Draft202012Validator(schema, format_checker=CHECKER).validate(json.loads(text))
    assert num_ended > 80
