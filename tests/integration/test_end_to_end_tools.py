"""Calls that must be made, by a tiny model of random weights on a real engine: every one of them parses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import openai
import pytest
from support.stack_fixtures import TINY_RECIPES, import_all

if TYPE_CHECKING:
    from support.stack import Stack

pytestmark = pytest.mark.integration

SET_LAMP = {
    "type": "function",
    "function": {
        "name": "lamp",
        "strict": True,
        "parameters": {
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "lamp"}}


def is_of_schema(arguments: str) -> bool:
    value = json.loads(arguments)
    return isinstance(value["on"], bool)


async def test_a_forced_call_always_parses_whatever_the_model(tiny_stack: Stack) -> None:
    import_all(tiny_stack)
    async with openai.AsyncOpenAI(
        base_url=f"http://{tiny_stack.gateway.addresses['http']}/v1", api_key="none", max_retries=0
    ) as client:
        num_ended = 0
        models = [tiny_stack.model.name, *TINY_RECIPES]
        for seed, model in enumerate(models * 2):
            asked: dict[str, Any] = {
                "model": model,
                "messages": [{"role": "user", "content": "on"}],
                "tools": [SET_LAMP],
                "tool_choice": NAMED if seed % 2 else "required",
                "parallel_tool_calls": False,
                "temperature": 1.5,
                "seed": seed,
                "n": 2,
            }
            answer = await client.chat.completions.create(**asked)
            for choice in answer.choices:
                if choice.finish_reason == "length":  # blanks, for want of room in 512 tokens
                    continue
                (call,) = choice.message.tool_calls or []
                num_ended += 1
                assert choice.message.content is None
                assert choice.finish_reason == ("stop" if seed % 2 else "tool_calls")
                assert call.type == "function"
                assert call.function.name == "lamp"
                assert is_of_schema(call.function.arguments)
        assert num_ended >= 4
