"""Which format a template's model writes in, told from the template's text or the tokenizer's own description."""

from __future__ import annotations

import json
from typing import Any

import pytest
from loraplex_gateway.chat_output import formats
from loraplex_gateway.chat_output.formats import OutputFormat, ThoughtTags, ToolFormat, output_format
from loraplex_gateway.chat_output.thoughts import Thinking, thinking_of
from loraplex_gateway.types import ChatMessage, ChatPrompt

THINK = ThoughtTags("<think>", "</think>")
# What tells the families apart, in templates of our own.
TOLD: list[tuple[str, ToolFormat | None]] = [
    ('{{ "<tool_call>\\n{\\"name\\": " }}', formats.HERMES),
    ("<tool_call>\n<function=x>\n<parameter=y>", formats.QWEN3_CODER),
    ("<tool_call>{{ name }}<arg_key>", None),
    ("[TOOL_CALLS][{}]", formats.MISTRAL),
    ("[TOOL_CALLS]{{ name }}[ARGS]{{ args }}", formats.MISTRAL_NAMED),
    ("<|python_tag|>", formats.LLAMA3_JSON),
    ('<|start_header_id|> {"name": function, "parameters": dictionary}', formats.LLAMA3_JSON),
    ("<|tool_call|>", formats.GRANITE),
    ("<|tool_call|> <|/tool_call|>", formats.PHI4_MINI),
    ("{{ tools }}", None),
]


@pytest.mark.parametrize(("source", "expected"), TOLD)
def test_a_template_that_reads_tools_tells_its_format(source: str, expected: ToolFormat | None) -> None:
    assert output_format(source, reads_tools=True).tools == expected


@pytest.mark.parametrize(("source", "_"), TOLD)
def test_a_template_without_tools_is_hermes_by_words(source: str, _: object) -> None:
    assert output_format(source, reads_tools=False).tools == formats.HERMES


def test_harmony_is_refused_by_name() -> None:
    assert "harmony" in output_format("<|channel|>analysis<|message|>", reads_tools=True).refusal


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ content.split('</think>')[-1] }}", THINK),
        ("[THINK]x[/THINK]", ThoughtTags("[THINK]", "[/THINK]")),
        ("plain", None),
    ],
)
def test_the_tags_of_thoughts_are_the_templates(source: str, expected: ThoughtTags | None) -> None:
    assert output_format(source, reads_tools=False).thoughts == expected


SPEC: dict[str, Any] = {
    "version": 1,
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<mind>", "close": "</mind>"},
        "tool_calls": {"open": "<call>", "close": "</call>", "content": "json", "repeats": True},
        "content": {},
    },
}


def test_the_tokenizers_own_description_goes_before_the_table() -> None:
    told = output_format("<tool_call> </think>", reads_tools=True, response_template=json.dumps(SPEC))

    assert told.thoughts == ThoughtTags("<mind>", "</mind>")
    assert told.tools is not None
    assert (told.tools.opening, told.tools.closing) == ("<call>", "</call>")


def test_a_description_of_known_tags_is_the_known_format() -> None:
    fields = {"tool_calls": {"open": "<tool_call>\n", "close": "\n</tool_call>", "content": "json"}}

    told = output_format("{{ tools }}", reads_tools=True, response_template=json.dumps({"fields": fields}))

    assert told.tools == formats.HERMES


def test_an_older_response_schema_is_searched_as_the_template_is() -> None:
    schema = {"x-regex": "<think>(.*)</think>", "properties": {"tool_calls": {"x-regex-iterator": "<tool_call>(.*)"}}}

    told = output_format("{{ tools }}", reads_tools=True, response_template=json.dumps(schema))

    assert told == OutputFormat(tools=formats.HERMES, thoughts=THINK)


@pytest.mark.parametrize(
    "spec", ["[]", '{"fields": 5}', '{"fields": {"tool_calls": 1}}', '{"fields": {"thinking": {}}}']
)
def test_a_description_that_says_nothing_leaves_the_table(spec: str) -> None:
    assert output_format("<tool_call>", reads_tools=True, response_template=spec).tools == formats.HERMES


def prompt(content: str = "hi", *, continued: bool = False, opens: bool = True) -> ChatPrompt:
    turn = ChatMessage(role="user", content=content)
    return ChatPrompt(messages=(turn,), continue_final_message=continued, add_generation_prompt=opens)


@pytest.mark.parametrize(
    ("asked", "rendered", "expected"),
    [
        (prompt(), "user hi assistant", Thinking.POSSIBLE),
        (prompt(), "user hi assistant <think>\n", Thinking.OPEN),
        (prompt(), "user hi assistant <think>\n\n</think>\n\n", Thinking.NONE),
        (prompt("<think>"), "user <think> assistant\n", Thinking.POSSIBLE),
        (prompt("<think> Hm", continued=True), "assistant <think> Hm", Thinking.OPEN),
        (prompt("<think> Hm </think> So", continued=True), "assistant <think> Hm </think> So", Thinking.NONE),
        (prompt("So", continued=True), "assistant So", Thinking.NONE),
    ],
)
def test_the_prompts_end_tells_whether_the_output_begins_with_thoughts(
    asked: ChatPrompt, rendered: str, expected: Thinking
) -> None:
    assert thinking_of(asked, rendered, THINK) == expected
    assert thinking_of(asked, rendered, None) == Thinking.NONE
