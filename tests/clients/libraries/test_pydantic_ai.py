"""Pydantic AI: an output's class by a tool and by a schema, through chat and through responses, and tools."""

from __future__ import annotations

from typing import Any

import pytest
from demo import DELFT, KEY, MESSAGES, MODEL, PROMPT, URL, Town, chat_text
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel])
def model(request: pytest.FixtureRequest) -> Any:
    return request.param(MODEL, provider=OpenAIProvider(base_url=URL, api_key=KEY))


async def test_a_streamed_text_is_the_whole_one(model: Any) -> None:
    agent = Agent(model, model_settings={"temperature": 0, "max_tokens": 24})

    async with agent.run_stream(PROMPT) as result:
        streamed = await result.get_output()

    assert streamed == (await agent.run(PROMPT)).output == chat_text(MESSAGES, 24)


async def test_a_schema_gives_the_object_that_it_gives_without_the_library(model: Any) -> None:
    agent = Agent(model, output_type=NativeOutput(Town), model_settings={"temperature": 0, "max_tokens": 300})

    assert (await agent.run(PROMPT)).output == DELFT


async def test_a_tool_gives_an_object_of_the_class(model: Any) -> None:
    agent = Agent(model, output_type=ToolOutput(Town), model_settings={"temperature": 0, "max_tokens": 300})

    assert isinstance((await agent.run(PROMPT)).output, Town)
