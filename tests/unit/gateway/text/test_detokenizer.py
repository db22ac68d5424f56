"""Pieces of text add up to what decoding everything at once gives, and never hold half a character."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_gateway.text.detokenizer import ByteLevelDetokenizer, make_detokenizer
from loraplex_gateway.text.token_table import TokenTable
from loraplex_gateway.text.window_detokenizer import WindowDetokenizer
from support.tokenizers_for_tests import byte_fallback_tokenizer, byte_level_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from collections.abc import Callable

TABLES = {"byte-level": TokenTable(byte_level_tokenizer()), "byte-fallback": TokenTable(byte_fallback_tokenizer())}
KINDS = pytest.mark.parametrize("kind", list(TABLES))


def stream(
    table: TokenTable, ids: list[int], *, skip_special_tokens: bool, prompt_ids: list[int] | None = None
) -> list[str]:
    detokenizer = make_detokenizer(table, skip_special_tokens=skip_special_tokens, prompt_ids=prompt_ids or [])
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


PIECES = (
    "a",
    "b",
    "ab",
    "\u2581",
    "\u2581a",
    "\u2581\u2581b",
    " ",
    "##a",
    "##b",
    "a</w>",
    ".",
    "\u4f60",
    "\u00e9",
    "n't",
    "\ufffd",
)
FALLBACK = tuple(f"<0x{byte:02X}>" for byte in (0x20, 0x41, 0xE4, 0xBD, 0xA0, 0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80, 0xFF))
SENTENCEPIECE = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS: dict[str, Callable[[], decoders.Decoder]] = {
    "byte-level": decoders.ByteLevel,
    "llama": lambda: decoders.Sequence([*SENTENCEPIECE, decoders.Strip(" ", 1, 0)]),
    "gemma": lambda: decoders.Sequence(SENTENCEPIECE),
    "metaspace": lambda: decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "metaspace-never": lambda: decoders.Metaspace(prepend_scheme="never"),
    "wordpiece": lambda: decoders.WordPiece(cleanup=False),
    "wordpiece-cleanup": lambda: decoders.WordPiece(cleanup=True),
    "end-of-word": lambda: decoders.BPEDecoder("</w>"),
    "no-decoder-of-bytes": decoders.Fuse,
}


def random_table(kind: str, pieces: list[str]) -> TokenTable:
    """Return a tokenizer whose tokens are these pieces, some raw bytes and two special tokens."""
    raw = sorted(pre_tokenizers.ByteLevel.alphabet()) if kind == "byte-level" else FALLBACK
    names = dict.fromkeys(["<unk>", *pieces, *raw])
    tokenizer = Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, [], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.decoder = DECODERS[kind]()
    return TokenTable(tokenizer)


def text_of_output(table: TokenTable, prompt: list[int], output: list[int], *, skip: bool) -> str:
    """The oracle: the text of all tokens without the prompt's."""

    def decode(ids: list[int]) -> str:
        return one_shot(table.tokenizer, ids, skip_special_tokens=skip)

    whole, before = decode(prompt + output), decode(prompt)
    if whole.startswith(before):
        return whole[len(before) :]
    prompt = [token_id for token_id in prompt if not (skip and token_id in table.special_ids)]
    if not before.endswith("\ufffd"):  # the output's bytes spoil those of the prompt, which has been shown
        while prompt and table.is_byte_token(prompt[-1]):
            prompt.pop()
        return decode(prompt + output)[len(decode(prompt)) :]
    # The output completed a character that the prompt began: all of it is the output's.
    shown = [decode(prompt[:end]) for end in range(len(prompt) + 1)]
    shown += [before[:end] for end in range(len(before.rstrip("\ufffd")), len(before))]
    return whole[max(len(text) for text in shown if whole.startswith(text)) :]


@pytest.mark.parametrize("kind", list(DECODERS))
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=60)
def test_prompt_and_output_add_up_to_the_text_of_all_tokens(kind: str, data: st.DataObject, skip: bool) -> None:
    table = random_table(kind, data.draw(st.lists(st.sampled_from(PIECES), unique=True, min_size=1)))
    ids = st.integers(0, table.tokenizer.get_vocab_size() - 1)
    prompt = data.draw(st.lists(ids, max_size=20))
    output = data.draw(st.lists(ids, max_size=12))

    pieces = stream(table, output, prompt_ids=prompt, skip_special_tokens=skip)

    assert "".join(pieces) == text_of_output(table, prompt, output, skip=skip)


def llama_ids(*tokens: str) -> list[int]:
    vocabulary = TABLES["byte-fallback"].tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


@pytest.mark.parametrize(
    ("prompt", "output", "expected"),
    [
        (["<s>", "\u2581hello"], ["\u2581world"], " world"),
        (["<s>", "\u2581hello"], ["world"], "world"),
        (["<s>"], ["\u2581world"], "world"),
        (["<s>", "\u2581"], ["\u2581world"], " world"),
        (["<s>", "\u2581hello"], ["<0xE4>", "<0xBD>", "<0xA0>", "!"], "\u4f60!"),
        (["\u2581hello", "<0xE4>", "<0xBD>"], ["<0xA0>", "!"], "\u4f60!"),
        (["\u2581hello", "<0xE4>", "<0xBD>"], ["!"], "!"),
        (["\u2581hello", "<0xE4>", "<0xBD>", "<0xA0>"], ["<0xA0>", "!"], "\ufffd!"),
    ],
)
def test_an_output_goes_on_where_its_prompt_ends(prompt: list[str], output: list[str], expected: str) -> None:
    pieces = stream(
        TABLES["byte-fallback"], llama_ids(*output), prompt_ids=llama_ids(*prompt), skip_special_tokens=True
    )

    assert "".join(pieces) == expected


def test_a_character_that_a_byte_level_prompt_began_is_the_outputs() -> None:
    table = TABLES["byte-level"]
    ids = table.tokenizer.encode("\U0001f600", add_special_tokens=False).ids
    (x,) = table.tokenizer.encode("x", add_special_tokens=False).ids

    assert stream(table, ids[3:], prompt_ids=ids[:3], skip_special_tokens=True) == ["\U0001f600", ""]
    assert stream(table, [x], prompt_ids=ids[:3], skip_special_tokens=True) == ["x", ""]
    assert stream(table, [], prompt_ids=ids[:3], skip_special_tokens=True) == [""]

    surrogate = table.tokenizer.encode("\ud7ff", add_special_tokens=False).ids[:1]
    surrogate += table.tokenizer.encode("\xe0", add_special_tokens=False).ids[1:]  # ED A0: no character begins so
    assert stream(table, [], prompt_ids=surrogate, skip_special_tokens=True) == [""]


def test_without_a_prompt_an_output_goes_on_with_an_unknown_text() -> None:
    detokenizer = make_detokenizer(TABLES["byte-fallback"], skip_special_tokens=True)

    assert detokenizer.push(*llama_ids("\u2581world")) == " world"


def test_a_prompts_end_is_enough_however_long_the_prompt() -> None:
    table = TABLES["byte-fallback"]
    prompt = llama_ids("\u2581hello") + llama_ids("<s>") * 5000
    detokenizer = make_detokenizer(table, skip_special_tokens=True, prompt_ids=prompt)

    assert detokenizer.push(*llama_ids("\u2581world")) == " world"


@KINDS
def test_token_bytes_of_an_unknown_id_are_none(kind: str) -> None:
    assert TABLES[kind].token_bytes(10**6) == b""


def test_token_text_shows_special_and_byte_tokens() -> None:
    table = TABLES["byte-fallback"]

    assert table.token_text(1) == "<s>"
    assert table.token_bytes(3 + 0xE4) == b"\xe4"
    assert table.token_text(3 + 0xE4) == "\ufffd"
