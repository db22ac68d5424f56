"""Tools and thoughts through /v1/responses and /v1/messages, with the official clients, there and back again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anthropic
import openai
import pytest
from support.thinker import prompt_of, write_thinker, writing

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": PARAMETERS,
}
OTHER: Any = {**FUNCTION, "name": "get_time"}
TOOL: Any = {"name": "get_weather", "description": "Weather of a city", "input_schema": PARAMETERS}
TEXT = (
    "<think>\nOslo, then.\n</think>\n\nLet me see.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "K\u00f6ln"}}\n</tool_call>'
)
USER: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_thinker(tmp_path_factory.mktemp("models") / "thinker")


async def test_a_response_thinks_speaks_and_calls_and_takes_it_all_back(valkey_url: str, thinker: Path) -> None:
    asked: dict[str, Any] = {"model": "thinker", "tools": [FUNCTION]}
    async with (
        writing(valkey_url, TEXT, thinker) as rig,
        openai.AsyncOpenAI(base_url=f"{rig.http}/v1", api_key="none", max_retries=0) as client,
    ):
        whole = await client.responses.create(input="hi", **asked)
        async with client.responses.stream(input="hi", **asked) as stream:
            events = [event async for event in stream]
            streamed = await stream.get_final_response()
        reasoning, message, call = whole.output
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        history: list[Any] = [*USER, *whole.output, result]
        await client.responses.create(input=history, **asked)

        assert [item.type for item in streamed.output] == ["reasoning", "message", "function_call"]
        assert reasoning.type == "reasoning"
        assert reasoning.content is not None
        assert reasoning.content[0].text.strip() == "Oslo, then."
        assert message.type == "message"
        assert whole.output_text == streamed.output_text == "Let me see."
        assert call.type == "function_call"
        assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "K\u00f6ln"})
        assert whole.usage is not None
        assert 0 < whole.usage.output_tokens_details.reasoning_tokens < whole.usage.output_tokens
        assert len([event for event in events if event.type == "response.function_call_arguments.delta"]) > 3
        prompt = prompt_of(rig)
        assert "<think>\nOslo, then.\n</think>\nLet me see.<tool_call>" in prompt
        assert "<|im_start|>tool\nrain<|im_end|>" in prompt


async def test_a_choice_of_tools_reaches_the_engine_as_a_constraint(valkey_url: str, thinker: Path) -> None:
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]}
    choices: list[tuple[Any, bool, tuple[str, ...]]] = [
        ("auto", False, ("get_weather", "get_time")),
        ("none", False, ()),
        ("required", True, ("get_weather", "get_time")),
        ({"type": "function", "name": "get_time"}, True, ("get_time",)),
        (allowed, True, ("get_time",)),
    ]
    async with (
        writing(valkey_url, TEXT, thinker) as rig,
        openai.AsyncOpenAI(base_url=f"{rig.http}/v1", api_key="none", max_retries=0) as client,
    ):
        for choice, is_constrained, offered in choices:
            response = await client.responses.create(
                model="thinker", input="hi", tools=[FUNCTION, OTHER], tool_choice=choice
            )

            submit = rig.engine.submits[-1]
            assert submit.HasField("structured_output") is is_constrained, choice
            for name in ("get_weather", "get_time"):
                assert (f'"{name}"' in prompt_of(rig)) is (name in offered), choice
                assert not is_constrained or (name in str(submit.structured_output)) is (name in offered), choice
            echoed: Any = response.to_dict()
            assert (echoed["tool_choice"], len(echoed["tools"])) == (choice, 2)
        strict: Any = {**FUNCTION, "strict": True}
        await client.responses.create(model="thinker", input="hi", tools=[strict])
        assert rig.engine.submits[-1].HasField("structured_output")


async def test_a_message_thinks_speaks_and_calls_and_takes_it_all_back(valkey_url: str, thinker: Path) -> None:
    asked: dict[str, Any] = {"model": "thinker", "max_tokens": 999, "tools": [TOOL]}
    async with (
        writing(valkey_url, TEXT, thinker) as rig,
        anthropic.AsyncAnthropic(base_url=rig.http, api_key="none", max_retries=0) as client,
    ):
        whole = await client.messages.create(messages=USER, **asked)
        async with client.messages.stream(messages=USER, **asked) as stream:
            events = [event async for event in stream]
            streamed = await stream.get_final_message()
        thinking, text, call = whole.content
        assert call.type == "tool_use"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "no such city", "is_error": True}
        history: Any = [*USER, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
        await client.messages.create(messages=history, **asked)

        assert [block.type for block in streamed.content] == ["thinking", "text", "tool_use"]
        assert thinking.type == "thinking"
        assert thinking.thinking.strip() == "Oslo, then."
        assert text.type == "text"
        assert text.text == "Let me see."
        assert (call.name, call.input) == ("get_weather", {"city": "K\u00f6ln"})
        assert streamed.content[2].to_dict()["input"] == call.input
        assert whole.stop_reason == streamed.stop_reason == "tool_use"
        assert len([event for event in events if event.type == "input_json"]) > 3
        prompt = prompt_of(rig)
        assert "<think>\nOslo, then.\n</think>\nLet me see.<tool_call>" in prompt
        assert "<|im_start|>tool\nError: no such city<|im_end|>" in prompt


async def test_anthropics_choices_of_tools_and_its_switch_of_thoughts(valkey_url: str, thinker: Path) -> None:
    named = {"type": "tool", "name": "get_weather"}
    choices: Any = [({"type": "auto"}, False), ({"type": "any"}, True), (named, True)]
    switches: Any = [({"type": "disabled"}, True), ({"type": "enabled", "budget_tokens": 1024}, False)]
    async with (
        writing(valkey_url, TEXT, thinker) as rig,
        anthropic.AsyncAnthropic(base_url=rig.http, api_key="none", max_retries=0) as client,
    ):
        asked: dict[str, Any] = {"model": "thinker", "max_tokens": 999, "messages": USER, "tools": [TOOL]}
        for choice, is_constrained in choices:
            only_one: Any = {**choice, "disable_parallel_tool_use": True}
            await client.messages.create(**asked, tool_choice=only_one)
            assert rig.engine.submits[-1].HasField("structured_output") is is_constrained, choice
        await client.messages.create(**asked, tool_choice={"type": "none"})
        assert "get_weather" not in prompt_of(rig)
        for thinking, is_off in switches:
            await client.messages.create(**{**asked, "tools": []}, thinking=thinking)
            assert prompt_of(rig).endswith("<think>\n\n</think>\n\n") is is_off
        for extra, param in (
            ({"tool_choice": {"type": "tool", "name": "get_time"}}, "tool_choice.name"),
            ({"tools": [{**TOOL, "name": "no name"}]}, "tools[0].name"),
            ({"tools": [{**TOOL, "input_schema": {"type": 5}}]}, "tools[0].input_schema"),
        ):
            with pytest.raises(anthropic.BadRequestError) as caught:
                await client.messages.create(**{**asked, **extra})
            body: Any = caught.value.body
            assert body["error"]["param"] == param, body
