"""Every field of a body is accounted for: served, ignored as documented, or refused by name."""

from __future__ import annotations

import gc
import json
import re
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from loraplex_common.errors import InvalidParameterError
from loraplex_gateway.openai import fields, further_fields
from loraplex_gateway.openai.adapter_bodies import LoadAdapterBody, UnloadAdapterBody
from loraplex_gateway.openai.body import decode
from loraplex_gateway.openai.errors import CODES, BodyNames
from loraplex_gateway.openai.field_docs import with_tables
from loraplex_gateway.openai.fields import Rule, Table
from loraplex_gateway.openai.output_fields import RESPONSE_FORMAT, STRUCTURED_OUTPUTS
from loraplex_gateway.openai.schema import (
    BodyAdapter,
    ChatBody,
    ChatTurn,
    CommonBody,
    CompletionBody,
    ContentPart,
    JsonSchemaFormat,
    ResponseFormat,
    StreamOptions,
    StructuredOutputs,
)
from loraplex_gateway.openai.tokenize_bodies import DetokenizeBody, TokenizeBody
from loraplex_gateway.requests.validation import COUNTS, RANGES

DOCS = Path(__file__).parents[4] / "docs" / "openai.md"
MESSAGES = fields.CHAT.nested["messages"]
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "x"}


def chat(**changes: Any) -> ChatBody:
    return decode(json.dumps({**CHAT, **changes}).encode(), ChatBody)


def completion(**changes: Any) -> CompletionBody:
    return decode(json.dumps({**COMPLETION, **changes}).encode(), CompletionBody)


@pytest.mark.parametrize(
    ("table", "struct"),
    [
        (fields.CHAT, ChatBody),
        (fields.COMPLETION, CompletionBody),
        (MESSAGES, ChatTurn),
        (MESSAGES.nested["content"], ContentPart),
        (fields.STREAM_OPTIONS, StreamOptions),
        (RESPONSE_FORMAT, ResponseFormat),
        (RESPONSE_FORMAT.nested["json_schema"], JsonSchemaFormat),
        (STRUCTURED_OUTPUTS, StructuredOutputs),
        (fields.ADAPTER, BodyAdapter),
        (further_fields.TOKENIZE, TokenizeBody),
        (further_fields.DETOKENIZE, DetokenizeBody),
        (further_fields.LOAD_ADAPTER, LoadAdapterBody),
        (further_fields.UNLOAD_ADAPTER, UnloadAdapterBody),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_the_table_calls_served_has_a_type(table: Table, struct: Any) -> None:
    served = {field.name for field in table.fields.values() if field.rule is Rule.SERVED}

    assert served == set(struct.__struct_fields__)


def test_the_documented_tables_are_the_code() -> None:
    page = DOCS.read_text(encoding="utf-8")

    assert with_tables(page) == page, "run: python -m loraplex_gateway.openai.field_docs docs/openai.md"


def test_the_documented_codes_are_the_code() -> None:
    rows = re.findall(r"^\| ([A-Z_, ]+) \| `(\w+)` \|$", (DOCS.parent / "errors.md").read_text(), re.MULTILINE)

    assert {reason: code for reasons, code in rows for reason in reasons.split(", ")} == CODES


@pytest.mark.parametrize("table", [fields.CHAT, fields.COMPLETION], ids=lambda table: table.name)
def test_every_field_that_validation_names_has_a_name_in_the_body(table: Table) -> None:
    names = BodyNames(table)
    reported = [rule.field for rule in RANGES] + [field for field, _ in COUNTS]
    reported += ["adapter", "model", "request_id", "cache_salt", "affinity_key", "prompt"]
    reported += ["messages"] if table is fields.CHAT else ["text", "token_ids"]

    for field in reported:
        assert names.field(field) in table.fields, field


@pytest.mark.parametrize(
    "name", ["adapter_id", "lora_path", "lora", "lora_name", "lora_request", "merged_adapters", "adapter"]
)
@pytest.mark.parametrize("call", [chat, completion])
def test_an_adapter_named_as_other_servers_do_is_told_its_place(call: Any, name: str) -> None:
    with pytest.raises(InvalidParameterError, match="put the adapter's name into model") as caught:
        call(**{name: "json"})

    assert caught.value.field == name


@pytest.mark.parametrize(
    "asked",
    [
        {"function_call": {"name": "f"}},
        {"functions": [{"name": "f"}]},
        {"length_penalty": 1.2},
        {"logits_processors": ["x"]},
        {"use_beam_search": True},
        {"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
        {"guided_whitespace_pattern": " "},
        {"store": True},
        {"verbosity": "low"},
        {"modalities": ["text", "audio"]},
        {"stream_options": {"include_obfuscation": True}},
        {"echo": True},
    ],
)
def test_what_asks_for_something_that_is_not_served_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameterError, match="not supported") as caught:
        chat(**asked)

    assert (caught.value.field or "").startswith(next(iter(asked)))


@pytest.mark.parametrize(
    "harmless",
    [
        {"tool_choice": "none"},
        {"tool_choice": "auto", "tools": [], "parallel_tool_calls": True},
        {"length_penalty": 1, "use_beam_search": False, "logits_processors": []},
        {"response_format": {"type": "text"}, "modalities": ["text"]},
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "s"},
        {"prompt_cache_key": "k", "prediction": {"type": "content", "content": "x"}},
        {"stream_options": {"include_usage": True, "include_obfuscation": False}},
    ],
)
def test_what_asks_for_nothing_passes(harmless: dict[str, Any]) -> None:
    assert chat(**harmless).model == "m"


def test_best_of_may_repeat_n() -> None:
    assert completion(best_of=1).n == completion(best_of=None).n == 1
    assert completion(best_of=3, n=3).n == 3
    for other in ({"best_of": 3}, {"best_of": 2, "n": 3}, {"best_of": True}):
        with pytest.raises(InvalidParameterError, match="best_of is not supported"):
            completion(**other)


def test_a_completion_may_repeat_max_tokens_under_the_name_of_chat() -> None:
    assert completion(max_tokens=5, max_completion_tokens=5).max_tokens == 5
    for other in ({"max_completion_tokens": 1}, {"max_completion_tokens": 6, "max_tokens": 5}):
        with pytest.raises(InvalidParameterError, match="max_completion_tokens is not supported: it is chat's name"):
            completion(**other)


@pytest.mark.parametrize(
    "extra",
    [
        {"type": "text"},  # lm-evaluation-harness
        {"cache_control": {"type": "ephemeral"}},
        {"provider_specific_fields": {"refusal": None}},  # LiteLLM
    ],
)
def test_what_clients_add_to_every_message_passes(extra: dict[str, Any]) -> None:
    assert chat(messages=[{"role": "user", "content": "x", **extra}]).messages[0].content == "x"


def test_true_is_not_one() -> None:
    with pytest.raises(InvalidParameterError, match="length_penalty is not supported"):
        chat(length_penalty=True)


@pytest.mark.parametrize("call", [chat, completion])
def test_null_is_as_if_the_field_were_absent(call: Any) -> None:
    table = fields.CHAT if call is chat else fields.COMPLETION
    body = CHAT if call is chat else COMPLETION

    nothing = {name: None for name in table.fields if name not in body}

    assert call(**nothing) == call()


def test_an_echoed_answer_passes_with_all_its_nulls() -> None:
    answer: dict[str, Any] = {"role": "assistant", "content": "hi", "refusal": None, "annotations": [], "audio": None}
    answer |= {"tool_calls": None, "function_call": None, "reasoning_content": None, "name": None}

    assert chat(messages=[answer, {**answer, "tool_calls": []}]).messages[1].content == "hi"


def test_a_parsed_answer_of_openai_s_clients_passes_as_it_was_read() -> None:
    function = {"name": "f", "arguments": '{"a": 1}'}
    call = {"id": "c", "type": "function", "function": {**function, "parsed_arguments": {"a": 1}}}
    turn: dict[str, Any] = {"role": "assistant", "content": '{"b": 2}', "parsed": {"b": 2}, "tool_calls": [call]}

    (read,) = chat(messages=[turn]).messages

    assert read.content == '{"b": 2}'
    assert [msgspec.to_builtins(made.function) for made in read.tool_calls or ()] == [function]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"function_call": {"name": "f", "arguments": "{}"}}, "messages[0].function_call"),
        ({"tool_calls": [{}]}, "messages[0].tool_calls[0].function"),
        ({"tool_calls": [{"function": {"name": "f", "x": 1}}]}, "messages[0].tool_calls[0].function.x"),
        ({"tool_calls": [{"type": "custom", "function": {"name": "f"}}]}, "messages[0].tool_calls[0].type"),
        ({"refusal": "no"}, "messages[0].refusal"),
        ({"audio": {"id": "a"}}, "messages[0].audio"),
        ({"weight": 0}, "messages[0].weight"),
        ({"content": [{"type": "text", "text": "x", "bold": True}]}, "messages[0].content[0].bold"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[0].content[0].image_url"),
        ({"role": 5}, "messages[0].role"),
    ],
)
def test_no_part_of_a_message_is_dropped(message: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        chat(messages=[{"role": "assistant", "content": "x", **message}])

    assert caught.value.field == field
    assert field in caught.value.message


def test_unknown_fields_are_named_all_at_once_with_what_they_may_mean() -> None:
    with pytest.raises(InvalidParameterError) as caught:
        chat(temprature=1, max_token=5, frobnicate=True)

    assert [field for field, _ in caught.value.violations] == ["temprature", "max_token", "frobnicate"]
    assert "did you mean temperature?" in caught.value.message
    assert "did you mean max_tokens?" in caught.value.message


@pytest.mark.parametrize(("field", "known"), [("load_policy", "fail_fast"), ("priority", "batch, normal, high")])
def test_a_word_that_is_not_known_is_told_those_that_are(field: str, known: str) -> None:
    with pytest.raises(InvalidParameterError, match=f"{field}: Invalid enum value 'x'; .*{known}"):
        chat(**{field: "x"})


@pytest.mark.parametrize("missing", ["model", "messages"])
@pytest.mark.parametrize("how", ["absent", "null"])
def test_a_field_that_must_be_there_is_named(missing: str, how: str) -> None:
    body = {**CHAT, missing: None} if how == "null" else {key: CHAT[key] for key in CHAT if key != missing}

    with pytest.raises(InvalidParameterError, match=f"{missing} is missing") as caught:
        decode(json.dumps(body).encode(), ChatBody)

    assert caught.value.field == missing


BROKEN = [
    (b'{"model": "m", "model": "n", "prompt": "x"}', "model is there more than once"),
    (b'{"model": "m", "prompt": "x", "logit_bias": {"5": 1, "5": 2}}', "5 is there more than once"),
    (b'{"model": "m", "prompt": "x", "temperature": NaN}', "NaN is no JSON number"),
    (b'{"model": "m", "prompt": "x", "temperature": -Infinity}', "-Infinity is no JSON number"),
    (b'{"model": "m", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", "no valid JSON"),
    (b'{"model": "m", "prompt": "x", "max_tokens": 1e400}', "max_tokens: Expected int, got float"),
    (b'{"model": "m", "prompt": "x", "metadata": ' + b"[" * 10**6 + b"]" * 10**6 + b"}", "nested too deeply"),
    (b'{"model": "m", "prompt": "x", "cache_salt": "\\ud800"}', "cache_salt is no valid Unicode"),
    (b'{"model": "m", "prompt": "x", "\\udfff": 1}', "lone surrogates"),
    (b"[]", "must be a JSON object"),
    (b'"x"', "must be a JSON object"),
    (b'\xef\xbb\xbf{"model": "m"}', "no valid JSON"),
    (b'{"model": "m", "prompt": "\xff"}', "no valid JSON in UTF-8"),
    (b"", "no valid JSON"),
]


@pytest.mark.parametrize(("body", "words"), BROKEN, ids=[words for _, words in BROKEN])
def test_a_broken_body_is_refused_in_words(body: bytes, words: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        decode(body, CompletionBody)

    assert words in caught.value.message
    assert caught.value.field is not None


def test_characters_beyond_16_bits_may_be_escaped() -> None:
    assert decode(b'{"model": "m", "prompt": "\\ud83d\\ude00"}', CompletionBody).prompt == "\U0001f600"


@pytest.mark.parametrize(
    "body",
    [
        {**COMPLETION, **{f"temperatur{n}": 1 for n in range(200_000)}},
        {**COMPLETION, "temperature" * 300_000: 1},
        {**CHAT, "messages": [{"role": "user", "content": "x", f"contents{n}": 1} for n in range(50_000)]},
    ],
    ids=["many names", "a long name", "many messages"],
)
def test_what_is_wrong_costs_little_however_much_it_is(body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    kind: type[CommonBody] = CompletionBody if "prompt" in body else ChatBody
    started_at = time.process_time()

    with pytest.raises(InvalidParameterError, match="unknown field") as caught:
        decode(data, kind)

    assert time.process_time() - started_at < 2
    assert len(caught.value.message) < 2000


@pytest.mark.parametrize("end", [b"]}", b"]"], ids=["whole", "broken"])
def test_the_garbage_collector_leaves_a_long_body_alone(end: bytes) -> None:
    data = b'{"model": "m", "prompt": [' + b"[1]," * 200_000 + b"[1]" + end
    num_before = sum(generation["collections"] for generation in gc.get_stats())

    if end == b"]}":
        assert len(decode(data, CompletionBody).prompt) == 200_001
    else:
        with pytest.raises(InvalidParameterError, match="no valid JSON"):
            decode(data, CompletionBody)

    assert sum(generation["collections"] for generation in gc.get_stats()) - num_before < 20
    assert gc.isenabled()
