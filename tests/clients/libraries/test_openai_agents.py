"""OpenAI's agents, on the Responses API that they use by default: a tool, a handoff and an output's class."""

from __future__ import annotations

import openai
import pytest
from agents import Agent, ModelSettings, Runner, function_tool, set_default_openai_client, set_tracing_disabled
from demo import KEY, MODEL, PROMPT, QUESTION, URL, Town

set_tracing_disabled(True)


@pytest.fixture(autouse=True)
def _client() -> None:
    set_default_openai_client(openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0), use_for_tracing=False)


async def test_an_agent_calls_its_tool_and_answers() -> None:
    cities: list[str] = []

    @function_tool
    def get_weather(city: str) -> str:
        """Weather of a city."""
        cities.append(city)
        return "sunny"

    settings = ModelSettings(temperature=0, tool_choice="get_weather", max_tokens=60)
    agent = Agent(name="weather", instructions="Help.", model=MODEL, tools=[get_weather], model_settings=settings)

    result = await Runner.run(agent, QUESTION, max_turns=3)

    assert len(cities) == 1
    assert result.final_output


async def test_an_agent_hands_off_to_another() -> None:
    poet = Agent(
        name="poet", instructions="Be brief.", model=MODEL, model_settings=ModelSettings(temperature=0, max_tokens=12)
    )
    settings = ModelSettings(temperature=0, tool_choice="required", max_tokens=60)
    door = Agent(name="door", instructions="Hand off.", model=MODEL, handoffs=[poet], model_settings=settings)

    result = await Runner.run(door, "Write about Delft.", max_turns=3)

    assert result.last_agent is poet
    assert result.final_output


async def test_an_output_is_an_object_of_its_class_also_in_a_streamed_run() -> None:
    settings = ModelSettings(temperature=0, max_tokens=200)
    agent = Agent(name="town", instructions="Write JSON.", model=MODEL, output_type=Town, model_settings=settings)

    whole = (await Runner.run(agent, PROMPT)).final_output
    streamed = Runner.run_streamed(agent, PROMPT)
    kinds = {event.type async for event in streamed.stream_events()}

    assert isinstance(whole, Town)
    assert streamed.final_output == whole
    assert "raw_response_event" in kinds
