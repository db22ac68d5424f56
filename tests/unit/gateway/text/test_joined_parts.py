"""What several adapters bring besides weights: one's part is all's, and two different ones are refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from loraplex_common.added_tokens import AddedToken
from loraplex_common.errors import InvalidParameterError
from loraplex_common.text_parts import GENERATION_RANGES, TextParts
from loraplex_gateway.adapters.names import ResolvedAdapter
from loraplex_gateway.text.joined_parts import TextNeeds, joined
from loraplex_gateway.types import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    OutputParsing,
    Sampling,
    Stopping,
    TextPrompt,
    TokenPrompt,
)

ALL = TextNeeds(has_template=True, is_parsed=True, settings=frozenset(GENERATION_RANGES), has_stops=True)
NONE = TextNeeds(has_template=False)
TEMPLATE = TextParts(chat_template="t", special_tokens={"eos_token": "<e>"})
CHAT = ChatPrompt(messages=(ChatMessage(role="user", content="hi"),))


def of(*parts: TextParts, needs: TextNeeds = ALL) -> TextParts:
    named = [ResolvedAdapter(name=f"a{n}", digest=f"{n}" * 64, base_fingerprint="f") for n in range(len(parts))]
    return joined([*zip(named, parts, strict=True)], needs)


@pytest.mark.parametrize(
    "part",
    [
        TEMPLATE,
        TextParts(generation={"temperature": 0.5}),
        TextParts(stop_token_ids=(5, 6)),
        TextParts(response_schema="{}"),
        TextParts(added_tokens=(AddedToken(id=300, content="<tool>"),)),
        TextParts(chat_template="t", generation={"top_k": 3}, stop_token_ids=(5,), response_schema="{}"),
    ],
)
def test_the_part_of_the_only_one_that_brings_it_applies_and_equal_ones_are_one(part: TextParts) -> None:
    assert of(part, TextParts()) == of(TextParts(), part) == of(part, TextParts(), part) == part


def test_adapters_that_add_different_tokens_are_refused_by_name() -> None:
    one, other = (TextParts(added_tokens=(AddedToken(id=300, content=text),)) for text in ("<a>", "<b>"))

    with pytest.raises(
        InvalidParameterError, match="adapters 'a0' and 'a1' bring different added tokens: name one of them"
    ):
        of(one, other)


def test_different_parts_of_different_adapters_come_together() -> None:
    one, other = (
        TextParts(generation={"temperature": 0.5, "top_k": 3}),
        TextParts(generation={"top_p": 0.5, "top_k": 3}),
    )

    assert of(TEMPLATE, one, other, TextParts(stop_token_ids=(5,))) == TextParts(
        chat_template="t",
        special_tokens={"eos_token": "<e>"},
        generation={"temperature": 0.5, "top_k": 3, "top_p": 0.5},
        stop_token_ids=(5,),
    )


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (TEMPLATE, TextParts(chat_template="u"), "different chat templates: render the conversation yourself"),
        (TEMPLATE, TextParts(chat_template="t"), "different special tokens"),
        (TextParts(response_schema="{}"), TextParts(response_schema="[]"), "different response schemas"),
        (TextParts(stop_token_ids=(5,)), TextParts(stop_token_ids=(5, 6)), "set stopping.ignore_eos"),
        (
            TextParts(generation={"temperature": 0.5}),
            TextParts(generation={"temperature": 0.0}),
            "different defaults of temperature, 0.5 and 0: set sampling.temperature",
        ),
    ],
)
def test_two_different_ones_are_refused_by_name_unless_the_request_has_no_use_for_them(
    one: TextParts, other: TextParts, words: str
) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        of(one, TextParts(), other)

    assert caught.value.field == "adapters"
    assert "adapters 'a0' and 'a2' bring" in caught.value.message
    assert words in caught.value.message
    assert of(one, other, needs=NONE) == TextParts()


def test_a_part_that_this_module_does_not_know_is_never_dropped() -> None:
    known = {
        "chat_template",
        "special_tokens",
        "generation",
        "stop_token_ids",
        "response_schema",
        "invocation_token_ids",
    }
    for field in fields(TextParts):
        if field.name not in known:  # one that came later: whatever it is, two different ones are refused
            values: list[Any] = [{field.name: (value,)} for value in "ab"]
            one, other = (TextParts(**value) for value in values)
            assert of(one, TextParts(), needs=NONE) == one
            with pytest.raises(InvalidParameterError, match="name one of them alone"):
                of(one, other, needs=NONE)


def test_an_adapter_that_tokens_activate_is_none_of_several() -> None:
    with pytest.raises(InvalidParameterError, match=r"adapters\[1\].name: adapter 'a1' is activated") as caught:
        of(TextParts(), TextParts(invocation_token_ids=(5,)), needs=NONE)

    assert caught.value.field == "adapters[1].name"


@pytest.mark.parametrize(
    ("request_fields", "needs"),
    [
        ({"prompt": TokenPrompt(ids=(1,)), "stopping": Stopping(ignore_eos=True)}, {}),
        ({"prompt": TextPrompt(text="x")}, {"has_stops": True}),
        ({"prompt": CHAT}, {"has_stops": True, "has_template": True}),
        ({"prompt": CHAT, "parsing": OutputParsing()}, {"has_stops": True, "has_template": True, "is_parsed": True}),
    ],
)
def test_a_request_needs_what_it_does_not_say_itself(request_fields: dict[str, Any], needs: dict[str, bool]) -> None:
    request = GenerationRequest(sampling=Sampling(temperature=0.0, top_k=0), **request_fields)

    unset = frozenset(GENERATION_RANGES) - {"temperature", "top_k"}
    wanted: dict[str, Any] = {"has_template": False, "settings": unset, **needs}
    assert TextNeeds.of(request) == TextNeeds(**wanted)


def test_a_chat_that_brings_its_template_needs_none() -> None:
    own = ChatPrompt(messages=CHAT.messages, template="own")

    assert TextNeeds.of(GenerationRequest(prompt=own, parsing=OutputParsing())) == TextNeeds(
        has_template=False, settings=frozenset(GENERATION_RANGES), has_stops=True
    )
