"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from loraplex.v1 import gateway_pb2
from loraplex_gateway.openai.convert import Plan
from loraplex_gateway.openai.errors import BodyNames
from loraplex_gateway.openai.fields import CHAT, COMPLETION
from loraplex_gateway.openai.render import Renderer
from loraplex_gateway.requests.output import OutputAssembler
from loraplex_gateway.text.token_table import TokenTable
from loraplex_gateway.types import (
    Chunk,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    PositionLogprobs,
    ResponseOptions,
    Stopping,
    TextPrompt,
    Timings,
    TokenLogprob,
    Usage,
)
from openai.types import Completion
from openai.types.chat import ChatCompletion
from support.tokenizers_for_tests import byte_level_tokenizer

TABLE = TokenTable(byte_level_tokenizer())
FINISHED = Finished(
    finish_reason=FinishReason.STOP, usage=Usage(prompt_tokens=1, output_tokens=1, cached_tokens=0), timings=Timings()
)


def ids(text: str) -> list[int]:
    return list(TABLE.tokenizer.encode(text, add_special_tokens=False).ids)


def choice_of(tokens: list[int], *, top: dict[int, float], chosen: float = -0.5, is_chat: bool = False) -> Any:
    """Return the one choice of the response, as the JSON that goes out, checked by OpenAI's own types."""
    output = OutputAssembler(TABLE, options=ResponseOptions(), stopping=Stopping(), stop_token_ids=frozenset())
    alternatives = [gateway_pb2.TokenLogprob(token_id=n, logprob=value) for n, value in top.items()]
    events: list[Event] = []
    for token_id in tokens:
        entry = gateway_pb2.TokenLogprob(token_id=token_id, logprob=chosen)
        chunk = output.push([token_id], [gateway_pb2.PositionLogprobs(chosen=entry, top=alternatives)])
        assert chunk is not None
        events.append(chunk)
    return choice_of_events(events, num_top=len(top), is_chat=is_chat)


def choice_of_events(events: list[Event], *, num_top: int, is_chat: bool = False) -> Any:
    plan = Plan(
        requests=(GenerationRequest(prompt=TextPrompt(text="x")),),
        model="m",
        is_chat=is_chat,
        names=BodyNames(CHAT if is_chat else COMPLETION),
        is_stream=False,
        include_usage=False,
        has_running_usage=False,
        logprobs=num_top,
        return_token_ids=False,
    )
    body = msgspec.json.encode(Renderer(plan, request_id="r").whole([[*events, FINISHED]]))
    (ChatCompletion if is_chat else Completion).model_validate_json(body, strict=True)
    return msgspec.json.decode(body)["choices"][0]


def test_the_bytes_of_a_character_are_alternatives_of_their_own() -> None:
    smile, wave = ids("\U0001f600"), ids("\U0001f44b")
    tops = {smile[0]: -0.5, smile[1]: -1.0, wave[2]: -2.0, ids("a")[0]: -3.0}

    logprobs = choice_of([*ids("x"), *smile, *ids("y")], top=tops)["logprobs"]

    assert logprobs["tokens"] == ["x", r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98", r"bytes:\x80", "y"]
    assert logprobs["top_logprobs"][1] == {r"bytes:\xf0": -0.5, r"bytes:\x9f": -1.0, r"bytes:\x91": -2.0, "a": -3.0}
    assert logprobs["text_offset"] == [0, 1, 1, 1, 1, 2]


def test_bytes_of_a_part_of_a_character_are_written_as_openai_writes_them() -> None:
    token = TokenLogprob(token_id=1, logprob=-1.0, text="", data=b" \\a\n\xf0\x9f")
    chunk = Chunk(sequence=0, index=0, token_ids=(1,), text="", logprobs=(PositionLogprobs(chosen=token),))

    assert choice_of_events([chunk], num_top=0)["logprobs"]["tokens"] == [r"bytes: \x5ca\x0a\xf0\x9f"]


def test_the_drawn_token_is_among_the_alternatives() -> None:
    logprobs = choice_of(ids("x"), top={ids("a")[0]: -0.25})["logprobs"]

    assert logprobs["top_logprobs"] == [{"a": -0.25, "x": -0.5}]
    assert choice_of(ids("x"), top={})["logprobs"]["top_logprobs"] == [{"x": -0.5}]


def test_minus_infinity_is_the_number_that_openai_uses() -> None:
    a = ids("a")[0]

    text = choice_of(ids("x"), chosen=-math.inf, top={a: -math.inf})["logprobs"]
    chat = choice_of(ids("x"), chosen=-math.inf, top={a: -math.inf}, is_chat=True)["logprobs"]

    assert (text["token_logprobs"], text["top_logprobs"]) == ([-9999.0], [{"a": -9999.0, "x": -9999.0}])
    assert [entry["logprob"] for entry in (chat["content"][0], *chat["content"][0]["top_logprobs"])] == [-9999.0] * 2


def test_bytes_are_the_tokens_own_in_a_chat_too() -> None:
    smile = ids("\U0001f600")

    entries = choice_of(smile, top={}, is_chat=True)["logprobs"]["content"]

    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "\U0001f600"
