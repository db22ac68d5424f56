"""Pieces of text add up to what decoding everything at once gives, and never hold half a character."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex_gateway.detokenizer import ByteLevelDetokenizer, TokenTable, WindowDetokenizer, make_detokenizer
from support.tokenizers_for_tests import byte_fallback_tokenizer, byte_level_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TABLES = {"byte-level": TokenTable(byte_level_tokenizer()), "byte-fallback": TokenTable(byte_fallback_tokenizer())}
KINDS = pytest.mark.parametrize("kind", list(TABLES))


def stream(table: TokenTable, ids: list[int], *, skip_special_tokens: bool) -> list[str]:
    detokenizer = make_detokenizer(table, skip_special_tokens=skip_special_tokens)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def one_shot(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))


@pytest.mark.parametrize(
    ("kind", "expected"), [("byte-level", ByteLevelDetokenizer), ("byte-fallback", WindowDetokenizer)]
)
def test_the_decoder_picks_the_detokenizer(kind: str, expected: type) -> None:
    assert isinstance(make_detokenizer(TABLES[kind], skip_special_tokens=True), expected)


@KINDS
@given(data=st.data(), skip=st.booleans())
def test_random_ids_stream_to_what_one_decode_gives(kind: str, data: st.DataObject, skip: bool) -> None:
    table = TABLES[kind]
    vocab_size = table.tokenizer.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, vocab_size - 1), max_size=40))

    pieces = stream(table, ids, skip_special_tokens=skip)

    assert "".join(pieces) == one_shot(table.tokenizer, ids, skip_special_tokens=skip)


@KINDS
@given(text=st.text(max_size=60), skip=st.booleans())
def test_real_text_streams_without_a_broken_character(kind: str, text: str, skip: bool) -> None:
    table = TABLES[kind]
    ids = table.tokenizer.encode(text, add_special_tokens=False).ids

    pieces = stream(table, ids, skip_special_tokens=skip)

    assert "".join(pieces) == one_shot(table.tokenizer, ids, skip_special_tokens=skip)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_several_tokens_comes_out_whole_and_at_once() -> None:
    table = TABLES["byte-level"]
    ids = table.tokenizer.encode("\U0001f600", add_special_tokens=False).ids

    pieces = stream(table, ids, skip_special_tokens=True)

    assert len(ids) == 4
    assert pieces == ["", "", "", "\U0001f600", ""]


def test_an_unfinished_character_ends_as_a_replacement() -> None:
    table = TABLES["byte-level"]
    ids = table.tokenizer.encode("\U0001f600", add_special_tokens=False).ids[:2]

    assert stream(table, ids, skip_special_tokens=True) == ["", "", "\ufffd"]


def test_the_space_before_a_word_survives_streaming() -> None:
    table = TABLES["byte-fallback"]
    ids = table.tokenizer.encode("hello world hello", add_special_tokens=False).ids

    assert stream(table, ids, skip_special_tokens=True) == ["hello", " world", " hello", ""]


@KINDS
def test_token_bytes_of_an_unknown_id_are_none(kind: str) -> None:
    assert TABLES[kind].token_bytes(10**6) == b""


def test_token_text_shows_special_and_byte_tokens() -> None:
    table = TABLES["byte-fallback"]

    assert table.token_text(1) == "<s>"
    assert table.token_bytes(3 + 0xE4) == b"\xe4"
    assert table.token_text(3 + 0xE4) == "\ufffd"
