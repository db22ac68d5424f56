"""instructor: an object of a class, by each of its ways to ask for one."""

from __future__ import annotations

import json

import instructor
import openai
import pytest
from demo import DELFT, KEY, MESSAGES, MODEL, URL, Town

# JSON mode only promises some JSON object; the base model repeats one that it is told, the adapter writes its own.
BASE = "SmolLM2-135M-Instruct"


def client(mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0), mode=mode)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA], ids=lambda mode: mode.name)
def test_an_answer_is_an_object_of_the_class(mode: instructor.Mode) -> None:
    found = client(mode).chat.completions.create(
        model=MODEL, messages=MESSAGES, response_model=Town, temperature=0, max_tokens=300, max_retries=0
    )

    assert isinstance(found, Town)


def test_in_json_mode_an_answer_of_the_right_form_is_an_object_of_the_class() -> None:
    told = [{"role": "user", "content": json.dumps(DELFT.model_dump())}]

    found = client(instructor.Mode.JSON).chat.completions.create(
        model=BASE, messages=told, response_model=Town, temperature=0, max_tokens=80, max_retries=0
    )

    assert found.model_dump() == DELFT.model_dump()
