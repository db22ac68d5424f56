"""Every field of the bodies of /v1/responses and /v1/messages is served, ignored as documented, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from loraplex_common.errors import InvalidParameterError
from loraplex_gateway.openai.errors import BodyNames, error_object
from loraplex_gateway.openai.fields import Rule, Table
from loraplex_gateway.openai.messages_api import fields as messages_fields
from loraplex_gateway.openai.messages_api import schema as messages
from loraplex_gateway.openai.messages_api.convert import messages_plan
from loraplex_gateway.openai.other_docs import PAGES, with_tables
from loraplex_gateway.openai.responses_api import fields as responses_fields
from loraplex_gateway.openai.responses_api import schema as responses
from loraplex_gateway.openai.responses_api.convert import responses_request
from loraplex_gateway.openai.tracing import Origin
from loraplex_gateway.requests.validation import COUNTS, RANGES

DOCS = Path(__file__).parents[4] / "docs"
ORIGIN = Origin(trace_id="t", request_id="r")

TABLES: list[tuple[Table, Any]] = [
    (responses_fields.RESPONSES, responses.ResponsesBody),
    (responses_fields.TEXT, responses.TextConfig),
    (responses_fields.FORMAT, responses.TextFormat),
    (responses_fields.REASONING, responses.ReasoningConfig),
    (responses_fields.MESSAGE, responses.MessageItem),
    (responses_fields.FUNCTION_CALL, responses.FunctionCallItem),
    (responses_fields.FUNCTION_CALL_OUTPUT, responses.FunctionCallOutputItem),
    (responses_fields.REASONING_ITEM, responses.ReasoningItem),
    (responses_fields.PART, responses.TextPart),
    (responses_fields.TOOL, responses.FunctionTool),
    (messages_fields.MESSAGES, messages.MessagesBody),
    (messages_fields.COUNT_TOKENS, messages.CountTokensBody),
    (messages_fields.THINKING, messages.Thinking),
    (messages_fields.TOOL_CHOICE, messages.ToolChoice),
    (messages_fields.OUTPUT_CONFIG, messages.OutputConfig),
    (messages_fields.FORMAT, messages.OutputFormat),
    (messages_fields.MESSAGE, messages.MessageTurn),
    (messages_fields.TEXT_BLOCK, messages.TextBlock),
    (messages_fields.TOOL_USE_BLOCK, messages.ToolUseBlock),
    (messages_fields.TOOL_RESULT_BLOCK, messages.ToolResultBlock),
    (messages_fields.THINKING_BLOCK, messages.ThinkingBlock),
    (messages_fields.TOOL, messages.CustomTool),
]


@pytest.mark.parametrize(("table", "struct"), TABLES, ids=lambda value: getattr(value, "name", ""))
def test_what_a_table_calls_served_has_a_type(table: Table, struct: Any) -> None:
    served = {field.name for field in table.fields.values() if field.rule is Rule.SERVED}

    assert served <= set(struct.__struct_fields__)
    # The bodies inherit the fields that all bodies share; what a body does not serve of them is refused by its table.
    unserved = set(struct.__struct_fields__) - served
    assert all(name not in table.fields or table.fields[name].rule is Rule.REFUSED for name in unserved)


@pytest.mark.parametrize("page", PAGES)
def test_the_documented_tables_are_the_code(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")

    assert with_tables(page, text) == text, f"run: python -m loraplex_gateway.openai.other_docs docs/{page}"


@pytest.mark.parametrize("table", [responses_fields.RESPONSES, messages_fields.MESSAGES], ids=lambda t: t.name)
def test_every_field_that_validation_names_has_a_name_in_the_body(table: Table) -> None:
    names = BodyNames(table)
    reported = [rule.field for rule in RANGES] + [field for field, _ in COUNTS]
    reported += ["adapter", "model", "request_id", "cache_salt", "affinity_key", "prompt", "messages"]
    reported.remove("response_options.prompt_logprobs")  # no field of these bodies
    if table is messages_fields.MESSAGES:
        reported.remove("response_options.logprobs")

    for field in reported:
        assert names.field(field) in table.fields, field


def asked(**members: Any) -> Any:
    data = json.dumps({"model": "m", "input": "x", **members}).encode()
    return responses_request(data, lambda _: True, origin=ORIGIN).plan.requests[0]


def message(**members: Any) -> Any:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5, **members}
    return messages_plan(json.dumps(body).encode(), lambda _: True, origin=ORIGIN).requests[0]


@pytest.mark.parametrize("call", [asked, message])
def test_all_bad_fields_are_named_at_once_with_what_they_may_mean(call: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        call(temprature=1, frobnicate=True, lora_name="x")

    assert [field for field, _ in caught.value.violations] == ["temprature", "frobnicate", "lora_name"]
    assert "did you mean temperature?" in caught.value.message
    assert "put the adapter's name into model" in caught.value.message


def test_an_input_that_is_too_long_is_cut_only_if_truncation_is_auto() -> None:
    assert asked().truncate_prompt_tokens is None
    assert asked(truncation="disabled").truncate_prompt_tokens is None
    assert asked(truncation="auto").truncate_prompt_tokens == -1


@pytest.mark.parametrize(
    ("thinking", "switch"), [({"type": "enabled"}, True), ({"type": "disabled"}, False), ({"type": "adaptive"}, None)]
)
def test_thinking_sets_the_switch_of_the_template(thinking: dict[str, Any], switch: bool | None) -> None:
    variables = message(thinking=thinking).prompt.template_kwargs

    assert variables.get("enable_thinking") is variables.get("thinking") is switch


def test_a_variable_of_the_template_goes_before_the_switch_of_thinking() -> None:
    given = message(thinking={"type": "enabled"}, chat_template_kwargs={"enable_thinking": False})

    assert given.prompt.template_kwargs == {"enable_thinking": False, "thinking": True}


def test_a_million_items_cost_little() -> None:
    with pytest.raises(InvalidParameterError, match="entries"):
        asked(input=[{"role": "user", "content": ""}] * 100_000)


def test_an_error_in_a_call_names_the_item_or_block_that_holds_it() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}
    items = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, call, call]
    data = json.dumps({"model": "m", "input": items}).encode()
    names = responses_request(data, lambda _: True, origin=ORIGIN).plan.names

    where = "messages[1].tool_calls[1]"
    assert names.field(f"{where}.function.arguments") == "input[3].arguments"
    assert names.field(f"{where}.id") == "input[3].call_id"
    assert names.text(f"{where}.function.arguments is no JSON", f"{where}.function.arguments") == (
        "input[3].arguments is no JSON"
    )

    use = {"type": "tool_use", "id": "c", "name": "", "input": {}}
    turns: list[dict[str, Any]] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    turns += [{"role": "assistant", "content": [{"type": "text", "text": "z"}, use]}, {"role": "user", "content": "x"}]
    names = messages_plan(
        json.dumps({"model": "m", "messages": turns, "max_tokens": 5, "system": "s"}).encode(),
        lambda _: True,
        origin=ORIGIN,
    ).names

    assert names.field("messages[2].tool_calls[0].function.name") == "messages[2].content[1].name"
    assert names.field("messages[2].tool_calls[0].function.arguments") == "messages[2].content[1].input"
    core = "messages[2].tool_calls[0].function.name"
    told = error_object(InvalidParameterError(f"{core} is no function's name", field=core), names)["error"]
    assert told["message"] == "messages[2].content[1].name is no function's name"


def test_an_error_of_a_constraint_that_tools_make_names_the_tools() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    tool = {"type": "function", "name": "f", "parameters": schema}
    data = json.dumps({"model": "m", "input": "x", "tools": [tool], "tool_choice": "required"}).encode()
    assert responses_request(data, lambda _: True, origin=ORIGIN).plan.names.field("structured_output") == "tools"

    body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
    body |= {"tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "any"}}
    assert (
        messages_plan(json.dumps(body).encode(), lambda _: True, origin=ORIGIN).names.field("structured_output")
        == "tools"
    )


def test_a_name_beside_a_choice_of_any_tool_is_not_dropped_in_silence() -> None:
    tool = {"name": "f", "input_schema": {"type": "object"}}
    with pytest.raises(InvalidParameterError, match=r"tool_choice\.name goes with type tool"):
        message(tools=[tool], tool_choice={"type": "any", "name": "f"})
