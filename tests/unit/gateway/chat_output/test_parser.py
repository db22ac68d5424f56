"""Parsers of chat output: what each format's text is taken apart into, however it is cut."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_gateway.chat_output import formats
from loraplex_gateway.chat_output.deltas import ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallStart
from loraplex_gateway.chat_output.formats import ThoughtTags, ToolFormat
from loraplex_gateway.chat_output.parser import OutputParser, ParserRules

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "tags": {"type": "array"},
            "note": {"type": ["string", "null"]},
        },
    },
    "now": {"type": "object"},
}
THINK = ThoughtTags("<think>", "</think>")
ALL_FORMATS = {
    "hermes": formats.HERMES,
    "qwen3_coder": formats.QWEN3_CODER,
    "llama3_json": formats.LLAMA3_JSON,
    "mistral": formats.MISTRAL,
    "mistral_named": formats.MISTRAL_NAMED,
    "granite": formats.GRANITE,
    "phi4": formats.PHI4_MINI,
    "plain": formats.PLAIN,
}


def rules(tools: ToolFormat | None = formats.HERMES, **fields: Any) -> ParserRules:
    return ParserRules(tools=tools, schemas=SCHEMAS, **fields)


def parse(pieces: Iterable[str], parser_rules: ParserRules) -> dict[str, Any]:
    """Return content, thoughts and calls, each joined; calls as (name, arguments' text)."""
    parser = OutputParser(parser_rules)
    content, thoughts, calls = "", "", list[list[str]]()
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    for delta in [*deltas, *parser.finish()]:
        if isinstance(delta, ContentDelta):
            assert delta.text
            content += delta.text
        elif isinstance(delta, ReasoningDelta):
            assert delta.text
            thoughts += delta.text
        elif isinstance(delta, ToolCallStart):
            assert delta.index == len(calls)
            calls.append([delta.name, ""])
        else:
            assert isinstance(delta, ArgumentsDelta)
            assert delta.index == len(calls) - 1
            calls[delta.index][1] += delta.text
    return {"content": content, "thoughts": thoughts, "calls": [(name, text) for name, text in calls]}


def cut(text: str, seed: int) -> list[str]:
    """Return the text in pieces of random lengths."""
    draw, pieces, at = random.Random(seed), [], 0
    longest = draw.choice([1, 2, 5, 20, 1000])
    while at < len(text):
        size = draw.randint(1, longest)
        pieces.append(text[at : at + size])
        at += size
    return pieces


def written(fmt: ToolFormat, name: str, arguments: dict[str, Any]) -> str:
    """Return one call as a format's model writes it, without what several share."""
    text = json.dumps(arguments, ensure_ascii=False)
    if fmt.name == "qwen3_coder":
        parameters = "".join(
            f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
            for key, value in arguments.items()
        )
        return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"
    if fmt.middle:
        return f"{fmt.opening}{name}{fmt.middle}{text}"
    body = f'{{"name": "{name}", "{fmt.arguments_key}": {text}}}'
    if fmt.is_list or not fmt.opening:
        return body
    return f"{fmt.opening}\n{body}\n{fmt.closing}"


def output(fmt: ToolFormat, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
    texts = [written(fmt, name, arguments) for name, arguments in calls]
    if fmt.is_list:
        return f"{fmt.opening}[{', '.join(texts)}]{fmt.closing}"
    return fmt.separator.join(texts)


ARGUMENTS = [
    {"city": "Paris"},
    {"city": 'He said "hi" \\ </tool_call> [TOOL_CALLS] {', "days": 3},
    {"city": "K\u00f6ln \u4f60\u597d \U0001f600\nline", "tags": [1, {"a": [True, None]}], "exact": False},
    {},
]


@pytest.mark.parametrize("name", list(ALL_FORMATS))
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_a_call_is_its_name_and_its_arguments(name: str, arguments: dict[str, Any]) -> None:
    fmt = ALL_FORMATS[name]

    parsed = parse([output(fmt, [("get_weather", arguments)])], rules(fmt))

    ((called, text),) = parsed["calls"]
    assert (called, json.loads(text), parsed["content"]) == ("get_weather", arguments, "")


@pytest.mark.parametrize("name", list(ALL_FORMATS))
def test_calls_in_a_row_are_counted_in_their_order(name: str) -> None:
    fmt = ALL_FORMATS[name]
    calls: list[tuple[str, dict[str, Any]]] = [
        ("get_weather", {"city": "a"}),
        ("now", {}),
        ("get_weather", {"days": 2}),
    ]

    parsed = parse([output(fmt, calls)], rules(fmt))

    assert [(called, json.loads(text)) for called, text in parsed["calls"]] == calls
    assert parsed["content"] == ""


@pytest.mark.parametrize("name", list(ALL_FORMATS))
def test_only_the_first_call_is_shown_where_one_is_wanted(name: str) -> None:
    fmt = ALL_FORMATS[name]
    calls: list[tuple[str, dict[str, Any]]] = [("get_weather", {"city": "a"}), ("now", {})]

    parsed = parse([output(fmt, calls)], rules(fmt, is_parallel=False))

    assert [called for called, _ in parsed["calls"]] == ["get_weather"]


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "mistral", "mistral_named", "granite", "phi4"])
def test_text_around_calls_is_content_without_the_space_between(name: str) -> None:
    fmt = ALL_FORMATS[name]
    text = f"Let me see. \n\n{output(fmt, [('now', {})])}\n"

    parsed = parse([text], rules(fmt))

    assert parsed == {"content": "Let me see.", "thoughts": "", "calls": [("now", "{}")]}


def test_text_behind_a_call_is_content() -> None:
    text = 'a <tool_call>{"name": "now", "arguments": {}}</tool_call>\n b '

    assert parse([text], rules()) == {"content": "ab", "thoughts": "", "calls": [("now", "{}")]}


MALFORMED = [
    ("hermes", "<tool_call>\nnow()\n</tool_call>"),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "a b", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arg'),
    ("hermes", "<tool_call>"),
    ("hermes", "<tool_ca"),
    ("hermes", 'I say <tool_call> and {"name": "now"}'),
    ("qwen3_coder", "<tool_call>\n<function now>\n</tool_call>"),
    ("qwen3_coder", "<tool_call>\n<function=a b>\n</function>"),
    ("llama3_json", '{"name": "someone else", "parameters": {}}'),
    ("llama3_json", '{"name": "unknown", "parameters": {}}'),
    ("llama3_json", '{"a": 1} and more'),
    ("llama3_json", '<|python_tag|>brave_search.call(query="x")'),
    ("mistral", "[TOOL_CALLS]nothing here"),
    ("mistral_named", "[TOOL_CALLS]two words[ARGS]{}"),
    ("granite", "<|tool_call|>no"),
]


@pytest.mark.parametrize(("name", "text"), MALFORMED)
def test_what_is_no_call_is_content_to_the_letter(name: str, text: str) -> None:
    for seed in range(10):
        assert parse(cut(text, seed), rules(ALL_FORMATS[name])) == {"content": text, "thoughts": "", "calls": []}


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"arguments": {"a": 1}, "name": "now"}', '{"a": 1}'),
        ('{"id": 7, "name": "now", "x": {"y": [1]}, "arguments": {"a": 1}, "z": "}"}', '{"a": 1}'),
        ('{"name": "now", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"name": "now", "arguments": null}', "{}"),
        ('{"name": "now"}', "{}"),
        ('{"name": "now", "parameters": {"a": 1}}', '{"a": 1}'),
        ('[{"name": "now", "arguments": {"a": 1}}]', '{"a": 1}'),
    ],
)
def test_a_calls_members_may_come_in_any_order(text: str, arguments: str) -> None:
    for seed in range(10):
        parsed = parse(cut(f"<tool_call>{text}</tool_call>", seed), rules())

        assert parsed == {"content": "", "thoughts": "", "calls": [("now", arguments)]}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("city", "5", "5"),
        ("city", "a\nb", "a\nb"),
        ("city", "", ""),
        ("days", "5", 5),
        ("days", "many", "many"),
        ("exact", "True", True),
        ("tags", '[1, "a"]', [1, "a"]),
        ("note", "null", None),
        ("note", "5", "5"),
        ("other", "5", "5"),
    ],
)
def test_xml_values_have_the_types_of_their_schema(key: str, value: str, expected: Any) -> None:
    text = f"<function=get_weather>\n<parameter={key}>\n{value}\n</parameter>\n</function>"
    for seed in range(10):
        ((_, arguments),) = parse(cut(text, seed), rules(formats.QWEN3_CODER))["calls"]

        assert json.loads(arguments) == {key: expected}


def test_arguments_come_as_their_text_comes() -> None:
    parser = OutputParser(rules())
    first = parser.push('<tool_call>{"name": "get_weather", "arguments": {"city": "Par')

    assert isinstance(first[0], ToolCallStart)
    assert first[0].id.startswith("call_")
    assert first[1:] == [ArgumentsDelta(0, '{"city": "Par')]
    assert list(parser.push('is"}}</tool_call>')) == [ArgumentsDelta(0, 'is"}')]


def test_mistrals_ids_have_nine_letters_as_its_templates_ask() -> None:
    parser = OutputParser(rules(formats.MISTRAL))
    (start, _) = parser.push('[TOOL_CALLS][{"name": "now", "arguments": {}}]')

    assert isinstance(start, ToolCallStart)
    assert len(start.id) == 9
    assert start.id.isalnum()


@pytest.mark.parametrize("starts_in_thought", [True, False])
def test_thoughts_are_told_from_content_without_the_space_around(starts_in_thought: bool) -> None:
    text = ("" if starts_in_thought else "\n<think>") + "\nLet me < think.\n</think>\n\nHello \n"
    for seed in range(20):
        parsed = parse(cut(text, seed), rules(None, thoughts=THINK, starts_in_thought=starts_in_thought))

        assert parsed == {"content": "Hello \n", "thoughts": "Let me < think.", "calls": []}


def test_a_thought_that_is_cut_is_all_thought() -> None:
    parsed = parse(["<think>Hm </th"], rules(None, thoughts=THINK))

    assert parsed == {"content": "", "thoughts": "Hm </th", "calls": []}


def test_calls_within_thoughts_are_thoughts() -> None:
    text = f"<think>{output(formats.HERMES, [('now', {})])}</think>\n{output(formats.HERMES, [('now', {})])}"

    parsed = parse([text], rules(thoughts=THINK))

    assert len(parsed["calls"]) == 1
    assert parsed["thoughts"] == output(formats.HERMES, [("now", {})])


def test_an_output_without_thoughts_is_content_as_it_is() -> None:
    assert parse(["  Hello ", "<think>"], rules(None, thoughts=THINK))["content"] == "  Hello <think>"


MARKS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<function=now>", "<function=", "</function>", "\n", " "),
    *("<parameter=city>", "<parameter=days>", "</parameter>", '{"name": "now", "arguments": {', "}}", '"', "\\", "}"),
    *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[{", '"name": "now"', '"parameters": {}', "]", ";", ",", "now", "x"),
    *("<|python_tag|>", "<|tool_call|>", "<|/tool_call|>", '{"name": "now", "parameters": {}}', "\u4f60", "5", "null"),
)


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(st.sampled_from(MARKS) | st.text(max_size=3), max_size=14),
    name=st.sampled_from(sorted(ALL_FORMATS)),
    seed=st.integers(0, 10**6),
    thinks=st.booleans(),
    starts_in_thought=st.booleans(),
)
def test_whatever_the_text_is_its_cuts_make_no_difference(
    parts: list[str], name: str, seed: int, thinks: bool, starts_in_thought: bool
) -> None:
    text = "".join(parts)
    tags = THINK if thinks else None
    parser_rules = rules(ALL_FORMATS[name], thoughts=tags, starts_in_thought=thinks and starts_in_thought)

    whole = parse([text], parser_rules)

    assert parse(cut(text, seed), parser_rules) == whole
    assert parse(list(text), parser_rules) == whole


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(
    arguments=st.dictionaries(st.text(max_size=6), JSON, max_size=4),
    name=st.sampled_from(sorted(set(ALL_FORMATS) - {"qwen3_coder"})),
    seed=st.integers(0, 10**6),
)
def test_any_arguments_come_through(arguments: dict[str, Any], name: str, seed: int) -> None:
    fmt = ALL_FORMATS[name]

    parsed = parse(cut(output(fmt, [("now", arguments), ("get_weather", arguments)]), seed), rules(fmt))

    assert [json.loads(text) for _, text in parsed["calls"]] == [arguments, arguments]


def test_without_tools_and_thoughts_nothing_is_held() -> None:
    parser = OutputParser(replace(rules(None)))

    assert list(parser.push("<tool_call> \n")) == [ContentDelta("<tool_call> \n")]
