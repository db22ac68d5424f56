"""Constraints on calls and thoughts: what llguidance accepts of them is what the parser reads."""

from __future__ import annotations

import functools
import json
from typing import Any

import llguidance
import pytest
from loraplex_common.errors import InvalidParameterError
from loraplex_common.structured_output import ConstraintKind, StructuredOutput
from loraplex_gateway.chat_output import formats
from loraplex_gateway.chat_output.deltas import ArgumentsDelta, ContentDelta
from loraplex_gateway.chat_output.formats import OutputFormat, ThoughtTags, ToolFormat
from loraplex_gateway.chat_output.reading import ChatReading, chat_reading
from loraplex_gateway.types import ChatMessage, ChatPrompt, OutputParsing, ToolMode
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "<|tool_call|>")
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"name": "get_weather", "parameters": CITY}
NOW = {"name": "now"}
THINK = ThoughtTags("<think>", "</think>")
FORMATS = {
    "hermes": formats.HERMES,
    "qwen3_coder": formats.QWEN3_CODER,
    "llama3_json": formats.LLAMA3_JSON,
    "mistral": formats.MISTRAL,
    "mistral_named": formats.MISTRAL_NAMED,
    "granite": formats.GRANITE,
    "phi4": formats.PHI4_MINI,
    "plain": formats.PLAIN,
}


@functools.cache
def tokenizer(*, has_markers: bool) -> Tokenizer:
    """Return a byte-level tokenizer in which the formats' markers are tokens, or are spelt."""
    result = Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    result.train_from_iterator(["the quick brown fox"], trainer)
    if has_markers:
        result.add_tokens([AddedToken(text, special=n % 2 == 0, normalized=False) for n, text in enumerate(MARKERS)])
    return result


@functools.cache
def ll_tokenizer(*, has_markers: bool) -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(tokenizer(has_markers=has_markers).to_str(), eos_token=1)


def reading(
    fmt: ToolFormat | None,
    mode: ToolMode,
    *functions: dict[str, Any],
    has_markers: bool = True,
    thoughts: ThoughtTags | None = None,
    rendered: str = "",
    is_parallel: bool = True,
    constraint: StructuredOutput | None = None,
) -> ChatReading:
    prompt = ChatPrompt(messages=(ChatMessage(role="user", content="hi"),), tools=functions)
    return chat_reading(
        prompt,
        OutputParsing(tool_mode=mode, is_parallel=is_parallel),
        output=OutputFormat(tools=fmt, thoughts=thoughts),
        rendered=rendered,
        token_id=tokenizer(has_markers=has_markers).token_to_id,
        constraint=constraint,
    )


def accepts(constraint: StructuredOutput | None, text: str, *, has_markers: bool = True) -> bool:
    """Return whether the whole text may be the output, and the output may end there."""
    assert constraint is not None
    ids = tokenizer(has_markers=has_markers).encode(text, add_special_tokens=False).ids
    if constraint.starts_after:
        (end,) = constraint.starts_after
        ids = ids[ids.index(end) + 1 :]
    if constraint.kind is ConstraintKind.GRAMMAR:
        compiled = llguidance.LLMatcher.grammar_from_lark(constraint.text)
    else:
        compiled = llguidance.LLMatcher.grammar_from_json_schema(constraint.text)
    matcher = llguidance.LLMatcher(ll_tokenizer(has_markers=has_markers), compiled)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def forced(fmt: ToolFormat, *calls: tuple[str, str]) -> str:
    """Return calls as a constrained output has them."""
    texts = [f'{{"name": "{name}", "{fmt.arguments_key}": {arguments}}}' for name, arguments in calls]
    if fmt.middle:
        return "".join(f"{fmt.opening}{name}{fmt.middle}{arguments}" for name, arguments in calls)
    if fmt.is_list:
        return f"{fmt.opening}[{', '.join(texts)}]{fmt.closing}"
    if fmt.opening:
        texts = [f"{fmt.opening}\n{text}\n{fmt.closing}" for text in texts]
    return fmt.separator.join(texts)


PARIS, OSLO, LATER = ("get_weather", '{"city": "Paris"}'), ("get_weather", '{"city": "Oslo"}'), ("now", "{}")


@pytest.mark.parametrize("has_markers", [True, False])
@pytest.mark.parametrize("name", list(FORMATS))
def test_a_call_that_must_be_made_is_one_that_parses(name: str, has_markers: bool) -> None:
    fmt = FORMATS[name]
    made = reading(fmt, ToolMode.REQUIRED, WEATHER, NOW, has_markers=has_markers)
    constraint = made.structured_output

    def fits(text: str) -> bool:
        return accepts(constraint, text, has_markers=has_markers)

    for calls in ([PARIS], [LATER], [PARIS, LATER, OSLO]):
        parser = made.parser()
        deltas = [*parser.push(forced(fmt, *calls)), *parser.finish()]
        assert fits(forced(fmt, *calls))
        assert [d.name for d in deltas if hasattr(d, "name")] == [called for called, _ in calls]
    assert not fits("Hello")
    assert not fits(forced(fmt, ("other", "{}")))
    assert not fits(forced(fmt, ("get_weather", '{"city": 5}')))
    assert not fits(forced(fmt, ("get_weather", "{}")))
    assert not fits(forced(fmt, PARIS)[:-1])
    assert not fits(f"{forced(fmt, PARIS)} bye")


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_forced_call_that_is_cut_anywhere_shows_none_of_its_format_as_text(name: str) -> None:
    made = reading(FORMATS[name], ToolMode.REQUIRED, WEATHER, NOW)
    whole = forced(FORMATS[name], PARIS, LATER)

    for end in range(len(whole)):
        parser = made.parser()
        deltas = [*parser.push(whole[:end]), *parser.finish()]
        assert not [delta for delta in deltas if isinstance(delta, ContentDelta)], whole[:end]
        arguments = "".join(d.text for d in deltas if isinstance(d, ArgumentsDelta) and d.index == 0)
        assert PARIS[1].startswith(arguments)


@pytest.mark.parametrize("name", list(FORMATS))
def test_without_parallel_calls_there_is_one(name: str) -> None:
    constraint = reading(FORMATS[name], ToolMode.REQUIRED, WEATHER, is_parallel=False).structured_output

    assert accepts(constraint, forced(FORMATS[name], PARIS))
    assert not accepts(constraint, forced(FORMATS[name], PARIS, OSLO))


@pytest.mark.parametrize("has_markers", [True, False])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "plain"])
def test_strict_functions_hold_calls_to_their_schema_and_leave_the_text_free(name: str, has_markers: bool) -> None:
    fmt = FORMATS[name]
    strict = {**WEATHER, "strict": True}
    constraint = reading(fmt, ToolMode.AUTO, strict, NOW, has_markers=has_markers).structured_output

    def fits(text: str) -> bool:
        return accepts(constraint, text, has_markers=has_markers)

    assert fits("Hello < [TOOL] {}\n")
    assert fits("")
    assert fits(forced(fmt, PARIS))
    assert fits(forced(fmt, LATER))
    assert fits(forced(fmt, ("now", '{"what": "ever"}')))
    if fmt.opening:
        assert fits(f"Let me see. {forced(fmt, PARIS)}")
    assert not fits(forced(fmt, ("get_weather", '{"city": 5}')))
    assert not fits(forced(fmt, ("other", "{}")))


def test_without_strict_functions_the_model_is_free() -> None:
    assert reading(formats.HERMES, ToolMode.AUTO, WEATHER).structured_output is None


THOUGHTS = [
    ("<s>", "<think>\nHm <tool\n</think>\n\n", True),
    ("<s>", "", True),
    ("<s><think>\n", "Hm </think>\n\n", True),
    ("<s><think>\n\n</think>\n\n", "", True),
    ("<s><think>\n\n</think>\n\n", "<think>Hm</think>", False),
]


@pytest.mark.parametrize("has_markers", [True, False])
@pytest.mark.parametrize(("rendered", "thought", "is_possible"), THOUGHTS)
def test_constraints_hold_behind_the_thoughts(
    rendered: str, thought: str, is_possible: bool, has_markers: bool
) -> None:
    schema = StructuredOutput(kind=ConstraintKind.JSON_SCHEMA, text=json.dumps(CITY))
    call = reading(
        formats.HERMES, ToolMode.REQUIRED, WEATHER, thoughts=THINK, rendered=rendered, has_markers=has_markers
    )
    answer = reading(None, ToolMode.NONE, thoughts=THINK, rendered=rendered, has_markers=has_markers, constraint=schema)

    for constraint, text in ((call, forced(formats.HERMES, PARIS)), (answer, '{"city": "Paris"}')):
        text = thought.strip() + text
        assert accepts(constraint.structured_output, text, has_markers=has_markers) == is_possible
        assert not accepts(constraint.structured_output, f"{thought.strip()}Hello", has_markers=has_markers)


CONTENT = [
    (ConstraintKind.JSON_OBJECT, "", '{"a": 1}', "[1]"),
    (ConstraintKind.CHOICE, '["yes", "n/\\"o"]', 'n/"o', "no"),
    (ConstraintKind.REGEX, r"a/b\/[0-9]+", "a/b/12", "a/b/"),
]


@pytest.mark.parametrize(("kind", "text", "good", "bad"), CONTENT)
def test_every_kind_waits_for_thoughts_that_may_come(kind: ConstraintKind, text: str, good: str, bad: str) -> None:
    constraint = reading(
        None, ToolMode.NONE, thoughts=THINK, constraint=StructuredOutput(kind=kind, text=text)
    ).structured_output

    assert accepts(constraint, good)
    assert accepts(constraint, f"<think>Hm</think>\n{good}")
    assert not accepts(constraint, bad)


def test_a_grammar_of_the_clients_waits_for_the_end_of_the_thoughts() -> None:
    grammar = StructuredOutput(kind=ConstraintKind.GRAMMAR, text='start: "a"')
    end = tokenizer(has_markers=True).token_to_id("</think>")
    assert end is not None

    assert reading(None, ToolMode.NONE, thoughts=THINK, constraint=grammar).structured_output == StructuredOutput(
        kind=ConstraintKind.GRAMMAR, text='start: "a"', starts_after=(end,)
    )
    with pytest.raises(InvalidParameterError, match="no token of its own"):
        reading(None, ToolMode.NONE, thoughts=THINK, constraint=grammar, has_markers=False)


def test_tools_beside_a_schema_are_a_call_or_an_answer_of_it() -> None:
    schema = StructuredOutput(kind=ConstraintKind.JSON_SCHEMA, text='{"type": "object", "required": ["a"]}')
    constraint = reading(formats.HERMES, ToolMode.AUTO, WEATHER, constraint=schema).structured_output

    assert accepts(constraint, '{"a": 1}')
    assert accepts(constraint, forced(formats.HERMES, PARIS))
    assert not accepts(constraint, "Hello")


def test_tools_beside_another_constraint_are_refused() -> None:
    regex = StructuredOutput(kind=ConstraintKind.REGEX, text="a+")

    with pytest.raises(InvalidParameterError, match="beside tools"):
        reading(formats.HERMES, ToolMode.AUTO, WEATHER, constraint=regex)


def test_parsers_see_the_special_tokens_of_their_format_alone() -> None:
    made = reading(formats.HERMES, ToolMode.AUTO, WEATHER, thoughts=THINK)
    ids = {tokenizer(has_markers=True).token_to_id(text) for text in MARKERS[:4]}

    assert made.shown_ids >= ids
    assert tokenizer(has_markers=True).token_to_id("<|tool_call|>") not in made.shown_ids
    assert reading(None, ToolMode.NONE).rules is None


def test_no_schema_makes_a_grammar_look_like_llama_cpps() -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"const": "x ::= y"}}}}

    constraint = reading(formats.HERMES, ToolMode.REQUIRED, function).structured_output

    assert constraint is not None
    assert "::=" not in constraint.text
    assert accepts(constraint, forced(formats.HERMES, ("f", '{"a": "x ::= y"}')))


def test_markers_that_an_adapter_adds_are_spelt_in_constraints_and_shown_in_outputs() -> None:
    base, own = tokenizer(has_markers=False), tokenizer(has_markers=True)
    prompt = ChatPrompt(messages=(ChatMessage(role="user", content="hi"),), tools=(WEATHER,))

    found = chat_reading(
        prompt,
        OutputParsing(tool_mode=ToolMode.REQUIRED),
        output=OutputFormat(tools=formats.HERMES, thoughts=THINK),
        rendered="<think>",
        token_id=own.token_to_id,
        base_token_id=base.token_to_id,
    )

    constraint = found.structured_output
    assert constraint is not None
    assert "<[" not in constraint.text
    assert constraint.starts_after == (own.token_to_id("</think>"),)
    assert found.shown_ids >= {own.token_to_id(text) for text in MARKERS[:4]}
    matcher = llguidance.LLMatcher(
        ll_tokenizer(has_markers=False), llguidance.LLMatcher.grammar_from_lark(constraint.text)
    )
    ids = base.encode(forced(formats.HERMES, ("get_weather", '{"city": "Rome"}')), add_special_tokens=False).ids
    assert matcher.try_consume_tokens(ids) == len(ids)
