"""LlamaIndex: objects by a function and by a schema, and tools."""

from __future__ import annotations

from typing import Any

from demo import DELFT, KEY, MESSAGES, MODEL, PROMPT, QUESTION, URL, Town, chat_text
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


def language_model(**options: Any) -> OpenAILike:
    server = {"model": MODEL, "api_base": URL, "api_key": KEY, "is_chat_model": True, "context_window": 4096}
    return OpenAILike(**{**server, "temperature": 0, "max_tokens": 200, "max_retries": 0, **options})


def get_weather(city: str) -> str:
    """Weather of a city."""
    return f"sunny in {city}"


def test_a_streamed_chat_is_the_whole_one() -> None:
    model, messages = language_model(max_tokens=24), [ChatMessage(PROMPT)]

    streamed = "".join(part.delta or "" for part in model.stream_chat(messages))

    assert streamed == model.chat(messages).message.content == chat_text(MESSAGES, 24)


def test_a_function_gives_an_object_of_the_class() -> None:
    model = language_model(is_function_calling_model=True)

    found = model.structured_predict(Town, PromptTemplate(PROMPT), llm_kwargs={"tool_choice": "required"})

    assert isinstance(found, Town)


def test_a_schema_gives_the_object_that_it_gives_without_the_library() -> None:
    model = language_model(is_function_calling_model=False, should_use_structured_outputs=True)

    assert model.structured_predict(Town, PromptTemplate(PROMPT)) == DELFT


def test_a_required_tool_is_called_and_its_result_goes_back() -> None:
    model, tool = language_model(is_function_calling_model=True), FunctionTool.from_defaults(get_weather)
    answer = model.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
    (call,) = model.get_tool_calls_from_response(answer)
    assert call.tool_name == "get_weather"
    assert set(call.tool_kwargs) == {"city"}

    result = ChatMessage(tool.call(**call.tool_kwargs).content, role="tool", tool_call_id=call.tool_id)
    assert model.chat([ChatMessage(QUESTION), answer.message, result], max_tokens=8).message.content
