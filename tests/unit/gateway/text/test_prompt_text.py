"""A prompt as text: as it was sent, with the place of each of its tokens."""

from __future__ import annotations

import pytest
from loraplex_gateway.text.prompt_text import prompt_text
from loraplex_gateway.text.token_table import TokenTable
from loraplex_gateway.types import TextPrompt, TokenPrompt
from support.tokenizers_for_tests import byte_fallback_tokenizer, byte_level_tokenizer
from tokenizers import Tokenizer

TABLES = {"byte level": TokenTable(byte_level_tokenizer()), "byte fallback": TokenTable(byte_fallback_tokenizer())}
TEXTS = ["hello world", "caf\u00e9 \U0001f600!", " two  spaces ", "a", "\u00e9"]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("add_special_tokens", [False, True])
def test_a_text_is_as_it_was_sent_and_its_tokens_lie_within(name: str, text: str, add_special_tokens: bool) -> None:
    table = TABLES[name]
    ids = table.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    shown = prompt_text(table, TextPrompt(text=text), ids, is_whole=True)

    assert shown.text == text
    assert len(shown.offsets) == len(ids)
    assert list(shown.offsets) == sorted(shown.offsets)
    assert shown.offsets[0] == 0
    for token_id, at in zip(ids, shown.offsets, strict=True):
        token = table.token_text(token_id)
        if token_id not in table.special_ids and "\ufffd" not in token:
            assert text[at:].startswith(token) or text[at:].startswith(token.lstrip())


@pytest.mark.parametrize("name", TABLES)
def test_token_ids_and_what_is_left_of_a_text_are_what_the_tokens_stand_for(name: str) -> None:
    table = TABLES[name]
    ids = table.tokenizer.encode("hello world", add_special_tokens=False).ids

    sent = prompt_text(table, TokenPrompt(ids=tuple(ids)), ids, is_whole=True)
    cut = prompt_text(table, TextPrompt(text="hello world"), ids[1:], is_whole=False)

    assert sent.text == table.tokenizer.decode(ids, skip_special_tokens=False) == "hello world"
    assert cut.text == table.tokenizer.decode(ids[1:], skip_special_tokens=False)


def test_a_special_token_that_was_sent_stays() -> None:
    table = TABLES["byte level"]
    ids = table.tokenizer.encode("<s>hi</s>", add_special_tokens=False).ids

    assert prompt_text(table, TextPrompt(text="<s>hi</s>"), ids, is_whole=True).text == "<s>hi</s>"
    assert prompt_text(table, TokenPrompt(ids=tuple(ids)), ids, is_whole=True).text == "<s>hi</s>"


def test_where_the_tokenizer_reads_another_text_the_places_stay_within_that_which_was_sent() -> None:
    tokenizer = Tokenizer.from_str(byte_level_tokenizer().to_str())
    table = TokenTable(tokenizer)
    ids = tokenizer.encode("HELLO WORLD, LONGER", add_special_tokens=False).ids

    shown = prompt_text(table, TextPrompt(text="short"), ids, is_whole=True)

    assert shown.text == "short"
    assert max(shown.offsets) <= len("short")
