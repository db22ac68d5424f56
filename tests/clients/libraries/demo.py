"""The served demo as a client library sees it: an address, a model's name, a schema and a tool."""

from __future__ import annotations

import json
import os
import urllib.request
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

URL = os.environ["LORAPLEX_URL"]
ROOT = URL.removesuffix("/v1")
MODEL = "json"  # the demo's adapter that turns sentences into JSON objects
PROMPT = "Describe the town of Delft as JSON."
MESSAGES = [{"role": "user", "content": PROMPT}]
QUESTION = "What is the weather in Delft?"
KEY = "none"  # the stack asks for no key, the libraries do


class Town(BaseModel):
    """A small town."""

    city: Annotated[str, Field(max_length=16)]
    kind: Literal["town", "village"]
    people: Annotated[int, Field(ge=0, le=99999)]


DELFT = Town(city="Delft", kind="town", people=3)
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 16}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "Weather of a city.", "parameters": PARAMETERS, "strict": True}


def post(path: str, **body: Any) -> dict[str, Any]:
    """Return the answer to a greedy request that no client library has touched."""
    data = json.dumps({"model": MODEL, "temperature": 0, **body}).encode()
    request = urllib.request.Request(URL + path, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def chat_text(messages: list[dict[str, Any]], max_tokens: int) -> str:
    """Return what a plain chat request answers."""
    answer = post("/chat/completions", messages=messages, max_tokens=max_tokens)
    text: str = answer["choices"][0]["message"]["content"]
    return text
