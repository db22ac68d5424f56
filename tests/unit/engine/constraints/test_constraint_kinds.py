"""Each kind of constraint takes the outputs that it should, and no others."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from loraplex_common.errors import InvalidParameterError
from loraplex_common.structured_output import ConstraintKind
from support.constraint_rig import begins, compile_here, mask_of, small_vocabulary, takes, walk

KIND = ConstraintKind
OBJECT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
OLD_TAG = {
    "structures": [
        {"begin": "<fn=a>", "schema": OBJECT, "end": "</fn>"},
        {"begin": "<fn=b>", "schema": {"type": "boolean"}, "end": "</fn>"},
    ],
    "triggers": ["<fn="],
}
TEXT = {"type": "any_text"}
CALL = {"type": "tag", "begin": "<c>", "content": {"type": "json_schema", "json_schema": OBJECT}, "end": ["</c>", "!"]}
TOOL = "<tool é>"  # a token of the tests' tokenizer
SPECIAL = "<|im_start|>"


def _tag(fmt: Any) -> str:
    return json.dumps({"type": "structural_tag", "format": fmt})


def _refusal(kind: ConstraintKind, text: str) -> str:
    with pytest.raises(InvalidParameterError) as refusal:
        compile_here(kind, text)
    assert refusal.value.message.startswith(f"{kind.value}: ")
    return refusal.value.message


@pytest.mark.parametrize(
    ("kind", "text", "taken", "not_taken"),
    [
        (KIND.JSON_OBJECT, "", ["{}", '{"a": [1, null]}'], ["[]", "1", "{}x", ""]),
        (KIND.JSON_SCHEMA, json.dumps(OBJECT), ['{"x":1}', '{\n  "x": -20\n}'], ["{}", '{"x":"1"}', '{"x":1,"y":2}']),
        (KIND.REGEX, r"[a-c]+\d?", ["a", "cab7"], ["", "d", "a77"]),
        (KIND.CHOICE, '["yes", "no", "yes, but", "1/2 \\"é\\"\\n"]', ["yes", "yes, but", '1/2 "é"\n'], ["ye", "yes,"]),
        (KIND.CHOICE, '["", "a"]', ["", "a"], ["b"]),
        (KIND.GRAMMAR, 'start: "a" n\nn: /[0-9]+/', ["a12"], ["a", "12"]),
        (KIND.GRAMMAR, 'start: "=" v\nv: %json {"type": "integer", "maximum": 9, "minimum": 0}', ["=7"], ["=10"]),
        (KIND.GRAMMAR, 'root ::= "a" item{2}\nitem ::= [0-9/] | "\\u00e9"', ["a1é", "a//"], ["a1", "a123"]),
        (KIND.GRAMMAR, "root ::= [\\u0041-\\u0043]+ # letters", ["ABC"], ["D"]),
    ],
)
def test_a_kind_takes_its_outputs_and_no_others(
    kind: ConstraintKind, text: str, taken: list[str], not_taken: list[str]
) -> None:
    constraint = compile_here(kind, text)
    assert [output for output in taken if not takes(constraint, output)] == []
    assert [output for output in not_taken if takes(constraint, output)] == []


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (KIND.CHOICE, "[]", "1 to 1024 texts"),
        (KIND.CHOICE, '["a", 1]', "a list of texts"),
        (KIND.CHOICE, "a", "it is no JSON"),
        (KIND.GRAMMAR, " ", "must have rules"),
        (KIND.GRAMMAR, "start: missing", 'unknown name: "missing"'),
        (KIND.GRAMMAR, "root ::= missing", "the grammar is no GBNF: "),
        (KIND.GRAMMAR, 'start: a\na[temperature=0.5]: "x"', "'temperature' is not served"),
        (KIND.GRAMMAR, 'start: a\na[lazy, stop="b"]: /x*/', "'stop' is not served"),
        (KIND.GRAMMAR, 'start: %json {"not": {}}', "rule 'start': keyword 'not' at #"),
        (KIND.GRAMMAR, 'start: a | b\na: %json {}\nb: "=" %json {"not": {}}', "rule 'b': keyword 'not' at #"),
        (KIND.GRAMMAR, 'start: a b\na: %json {}\nb: %json {"allOf": [false]}', "rule 'b': no value satisfies"),
        (KIND.GRAMMAR, "root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "nested too deeply"),
        (KIND.STRUCTURAL_TAG, "[]", "an object is needed"),
        (KIND.STRUCTURAL_TAG, "{}", "'structures' must have"),
        (KIND.STRUCTURAL_TAG, json.dumps(OLD_TAG | {"triggers": ["<x"]}), "must begin with one of the triggers"),
        (KIND.STRUCTURAL_TAG, json.dumps({"structures": [{"begin": "<a>"}], "triggers": ["<a"]}), "lacks 'end'"),
        (KIND.STRUCTURAL_TAG, json.dumps(OLD_TAG | {"other": 1}), "'other' is not known"),
        (KIND.STRUCTURAL_TAG, _tag({"type": "qwen_xml_parameter", "json_schema": {}}), "'qwen_xml_parameter'"),
        (KIND.STRUCTURAL_TAG, _tag({"type": "json_schema", "json_schema": {}, "style": "glm_xml"}), "'glm_xml'"),
        (KIND.STRUCTURAL_TAG, _tag({"type": "json_schema", "json_schema": {}, "any_order": True}), "any_order"),
        (KIND.STRUCTURAL_TAG, _tag({"type": "any_text", "max_tokens": 3}), "'max_tokens' of any_text"),
        (KIND.STRUCTURAL_TAG, _tag({"type": "star", "content": TEXT}), "any_text cannot be repeated"),
        (KIND.STRUCTURAL_TAG, _tag({"type": "sequence", "elements": [TEXT, TEXT]}), "must be followed by"),
        (KIND.STRUCTURAL_TAG, _tag({"type": "const_string", "value": 3}), "'value' of const_string must have a text"),
        (KIND.STRUCTURAL_TAG, _tag({"type": "token", "token": "no token"}), "no single token"),
        (KIND.STRUCTURAL_TAG, _tag({"type": "token", "token": 349}), "no token 349"),
        (KIND.STRUCTURAL_TAG, _tag({"type": "json_schema", "json_schema": {"not": {}}}), "keyword 'not' at #"),
    ],
)
def test_what_a_kind_cannot_take_is_refused_with_its_reason(kind: ConstraintKind, text: str, reason: str) -> None:
    assert reason in _refusal(kind, text)


@pytest.mark.parametrize(
    ("fmt", "taken", "not_taken"),
    [
        (OLD_TAG, ["hi", "", 'a<fn=a>{"x":1}</fn>b<fn=b>true</fn>'], ["a<fn=", "<fn=c>", '<fn=a>{"x":true}</fn>']),
        (CALL, ['<c>{"x":1}</c>', '<c>{"x":1}!'], ['{"x":1}', '<c>{"x":1}', '<c>{"x":1}</c>!']),
        ({"type": "const_string", "value": "a/b\n"}, ["a/b\n"], ["a/b"]),
        ({"type": "any_text", "excludes": ["bad", "x"]}, ["good", "ba d"], ["a bad one", "x"]),
        ({"type": "any_text", "max_chars": 3}, ["", "äöü"], ["abcd"]),
        ({"type": "regex", "pattern": "[ab]{2}"}, ["ab"], ["a", "abc"]),
        ({"type": "grammar", "grammar": 'root ::= "a" | "b"'}, ["b"], ["c"]),
        ({"type": "or", "elements": [CALL, {"type": "const_string", "value": "no"}]}, ["no", '<c>{"x":1}!'], ["yes"]),
        ({"type": "optional", "content": CALL}, ["", '<c>{"x":1}!'], ['<c>{"x":1}!<c>{"x":1}!']),
        ({"type": "star", "content": {"type": "const_string", "value": "ab"}}, ["", "abab"], ["a"]),
        ({"type": "plus", "content": {"type": "const_string", "value": "ab"}}, ["ab", "abab"], ["", "aba"]),
        (
            {"type": "repeat", "min": 1, "max": 2, "content": {"type": "regex", "pattern": "x"}},
            ["x", "xx"],
            ["", "xxx"],
        ),
        ({"type": "repeat", "min": 2, "max": -1, "content": {"type": "regex", "pattern": "x"}}, ["xx", "xxxx"], ["x"]),
        (
            {"type": "sequence", "elements": [TEXT, CALL, TEXT, {"type": "const_string", "value": "END"}]},
            ['a<c>{"x":1}!bcEND', '<c>{"x":1}!END'],
            ["END", '<c>{"x":1}!ENDa', '<c>{"x":1}!'],
        ),
        (
            {"type": "tag", "begin": "<t>", "content": TEXT, "end": "</t>"},
            ["<t></t>", "<t>free <t> text</t>"],
            ["<t>a", "<t></t>b"],
        ),
        (
            {"type": "tags_with_separator", "tags": [CALL], "separator": ", "},
            ["", '<c>{"x":1}!', '<c>{"x":1}!, <c>{"x":2}!'],
            ['<c>{"x":1}!, ', "x"],
        ),
        (
            {
                "type": "tags_with_separator",
                "tags": [CALL],
                "separator": ",",
                "at_least_one": True,
                "stop_after_first": True,
            },
            ['<c>{"x":1}!'],
            ["", '<c>{"x":1}!,<c>{"x":2}!'],
        ),
        (
            {"type": "triggered_tags", "triggers": ["<c"], "tags": [CALL], "at_least_one": True},
            ['<c>{"x":1}!', '<c>{"x":1}! and <c>{"x":2}!'],
            ["", "text", 'text <c>{"x":1}!'],
        ),
        (
            {
                "type": "triggered_tags",
                "triggers": ["<c"],
                "tags": [CALL],
                "stop_after_first": True,
                "excludes": ["zz"],
            },
            ["", "text", 'text <c>{"x":1}!'],
            ['<c>{"x":1}! more', "zz", 'zz<c>{"x":1}!'],
        ),
        (
            {"type": "dispatch", "rules": [["no:", {"type": "regex", "pattern": "[0-9]"}]], "loop": True},
            ["", "no:1 and no:2", "no"],
            ["no:", "no:x"],
        ),
    ],
)
def test_a_structural_tag_takes_its_outputs_and_no_others(fmt: Any, taken: list[str], not_taken: list[str]) -> None:
    text = json.dumps(fmt) if "structures" in fmt else _tag(fmt)
    constraint = compile_here(KIND.STRUCTURAL_TAG, text)
    assert [output for output in taken if not takes(constraint, output)] == []
    assert [output for output in not_taken if takes(constraint, output)] == []


def test_a_tag_that_begins_with_a_token_of_the_model_is_that_token_and_as_a_trigger_either_spelling() -> None:
    vocabulary = small_vocabulary()
    token = vocabulary.special_tokens[TOOL]
    tag = {"type": "tag", "begin": f"{TOOL}f", "content": {"type": "regex", "pattern": "[0-9]"}, "end": ";"}
    alone = compile_here(KIND.STRUCTURAL_TAG, _tag(tag)).start(())
    assert mask_of(alone) == [token]
    triggered = _tag({"type": "triggered_tags", "triggers": [TOOL], "tags": [tag]})
    constraint = compile_here(KIND.STRUCTURAL_TAG, triggered)
    spelled = vocabulary.tokenizer.tokenize_str(f"text {TOOL}")
    for ids in ([token], [*vocabulary.tokenizer.tokenize_str("text "), token], spelled):
        assert {vocabulary.tokenizer.decode_str([next_id])[:1] for next_id in mask_of(constraint.start(ids))} == {"f"}


@pytest.mark.parametrize("special", [SPECIAL, TOOL])
@pytest.mark.parametrize("kind", [KIND.CHOICE, KIND.REGEX, KIND.JSON_SCHEMA, KIND.GRAMMAR, KIND.STRUCTURAL_TAG])
def test_the_text_of_a_special_token_is_written_as_text_where_no_other_text_is_possible(
    kind: ConstraintKind, special: str
) -> None:
    schema, quoted = json.dumps({"const": special}), json.dumps(special, ensure_ascii=False)
    text, output = {
        KIND.CHOICE: (json.dumps([f"it is {special}!"]), f"it is {special}!"),
        KIND.REGEX: ("a{20}" + special.replace("|", r"\|"), "a" * 20 + special),  # behind what a trial draws
        KIND.JSON_SCHEMA: (schema, quoted),
        KIND.GRAMMAR: (f'start: "{special}" n\nn: %json {schema}', f"{special}{quoted}"),
        KIND.STRUCTURAL_TAG: (_tag({"type": "json_schema", "json_schema": {"enum": [special]}}), quoted),
    }[kind]
    vocabulary = small_vocabulary()
    tokens = walk(compile_here(kind, text).start(()), Random(0), max_tokens=80)
    assert vocabulary.tokenizer.decode_str([*tokens]) == output
    assert not {*vocabulary.special_tokens.values()} & {*tokens}


def test_formats_of_tokens_are_about_tokens() -> None:
    vocabulary = small_vocabulary()
    special, tool = vocabulary.special_tokens[SPECIAL], vocabulary.special_tokens[TOOL]
    number = {"type": "regex", "pattern": "[0-9]"}
    tag = {
        "type": "tag",
        "begin": {"type": "token", "token": TOOL},
        "content": number,
        "end": {"type": "token", "token": special},
    }
    one = compile_here(KIND.STRUCTURAL_TAG, _tag(tag))
    digit = vocabulary.tokenizer.tokenize_str("7")
    assert one.start([tool, *digit, special]).is_ended
    but = compile_here(KIND.STRUCTURAL_TAG, _tag({"type": "exclude_token", "exclude_tokens": [TOOL]}))
    everything = set(range(vocabulary.num_tokens)) - {tool, *vocabulary.eos_token_ids}
    assert set(mask_of(but.start(()))) == everything
    many = compile_here(KIND.STRUCTURAL_TAG, _tag({"type": "any_tokens", "exclude_tokens": [], "max_tokens": 2}))
    assert many.start([tool, *digit]).is_ended
    rules = {"type": "token_triggered_tags", "trigger_tokens": [TOOL], "tags": [tag]}
    dispatch = {"type": "token_dispatch", "rules": [[TOOL, number]], "loop": False}
    for fmt in (rules, dispatch):
        constraint = compile_here(KIND.STRUCTURAL_TAG, _tag(fmt))
        after = mask_of(constraint.start([*vocabulary.tokenizer.tokenize_str("free"), tool]))
        assert {vocabulary.tokenizer.decode_str([token_id]) for token_id in after} == set("0123456789")


def test_text_that_looks_like_the_beginning_of_a_tag_is_free_until_the_trigger_is_whole() -> None:
    constraint = compile_here(KIND.STRUCTURAL_TAG, json.dumps(OLD_TAG))
    assert begins(constraint, "a <f <fn <fn=")
    assert not begins(constraint, "a <fn=x")
