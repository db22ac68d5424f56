"""An adapter's added tokens are encoded and decoded as transformers does with the tokenizer beside the adapter."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from loraplex_adapter_store.checkpoint.tokenizer_files import check_tokenizer_files
from loraplex_common import added_tokens as ours
from loraplex_common.extended_tokenizer import extended_tokenizer
from loraplex_gateway.text.detokenizer import make_detokenizer
from loraplex_gateway.text.fair_workers import FairWorkers
from loraplex_gateway.text.tokenization import PromptTokenizer
from loraplex_gateway.types import TextPrompt
from support.added_tokens import extended_by_transformers, saved
from support.base_models import TinyBase, write_base_model
from support.tokenizers_for_tests import byte_fallback_tokenizer, byte_level_tokenizer
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_gateway.text.token_table import TokenTable

KINDS = pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
WORDS = ("hello", "world", " ", "  ", "\n", "x", "grüße", "你好", "ab", "\u0120hi", "<tool_call>", "T\u00c9", ".")
CONTENTS = st.one_of(
    st.sampled_from(
        ["<tool_call>", "</tool_call>", "hello", "T\u00c9", "ab", "<|x|>", " sp", "\u4f60", "\u0120hi", "a b"]
    ),
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=6),
)


@st.composite
def additions(draw: st.DrawFn) -> list[AddedToken]:
    """Draw tokens that an adapter may add, with any flags."""
    contents = draw(st.lists(CONTENTS, min_size=1, max_size=5, unique=True))
    return [
        AddedToken(
            content,
            special=draw(st.booleans()),
            normalized=draw(st.booleans()),
            lstrip=draw(st.booleans()),
            rstrip=draw(st.booleans()),
            single_word=draw(st.booleans()),
        )
        for content in contents
    ]


@functools.cache
def base_dir(kind: str) -> Path:
    """Return a base model's folder with more rows than tokens."""
    tokenizer = {"byte-level": byte_level_tokenizer, "byte-fallback": byte_fallback_tokenizer}[kind]()
    directory = write_base_model(Path(tempfile.mkdtemp()) / kind, TinyBase())
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@functools.cache
def base_tokenizer(kind: str) -> PromptTokenizer:
    return PromptTokenizer.from_directory(base_dir(kind), FairWorkers())


def of_files(kind: str, files: dict[str, bytes]) -> PromptTokenizer:
    """Return the gateway's tokenizer of an adapter with these files."""
    added = check_tokenizer_files(files, base_dir(kind)).parts.added_tokens
    base = base_tokenizer(kind)
    return base.with_added_tokens(base.table.extended(added), frozenset(token.id for token in added))


def streamed(table: TokenTable, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    detokenizer = make_detokenizer(table, skip_special_tokens=skip_special_tokens, prompt_ids=())
    return "".join([*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()])


@KINDS
@settings(max_examples=40, deadline=None, phases=[Phase.generate])
@given(tokens=additions(), data=st.data())
def test_texts_and_ids_are_those_of_transformers_with_the_adapters_folder(
    kind: str, tokens: list[AddedToken], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = saved(extended_by_transformers(base_dir(kind), tokens), Path(folder))
        theirs: Any = AutoTokenizer.from_pretrained(folder)
    gateway = of_files(kind, files)
    pieces = st.sampled_from([*WORDS, *(token.content for token in tokens)])
    texts = ["".join(data.draw(st.lists(pieces, min_size=1, max_size=8))) for _ in range(8)]

    for text in texts:
        for special in (True, False):
            prompt = TextPrompt(text=text, add_special_tokens=special)
            ids = gateway.encode_now(prompt).ids
            assert list(ids) == theirs.encode(text, add_special_tokens=special), (text, tokens)
    for _ in range(8):
        drawn = data.draw(st.lists(st.integers(0, len(theirs) - 1), max_size=20))
        for skip in (True, False):
            expected = theirs.decode(drawn, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert streamed(gateway.table, drawn, skip_special_tokens=skip) == expected
            assert gateway.decode_now(drawn, skip_special_tokens=skip) == expected


@KINDS
def test_the_base_models_tokenizer_never_changes(kind: str) -> None:
    base = base_tokenizer(kind)
    before, text = base._tokenizer.to_str(), "hello <tool> world"
    ids = base.encode_now(TextPrompt(text=text)).ids
    tokens = [
        ours.AddedToken(id=base._tokenizer.get_vocab_size() + n, content=content, special=n % 2 == 0)
        for n, content in enumerate(("<tool>", "hello world"))
    ]

    one, other = base.table.extended(tokens[:1]), base.table.extended([tokens[0], tokens[1]])

    assert base._tokenizer.to_str() == before
    assert base.encode_now(TextPrompt(text=text)).ids == ids
    assert one.tokenizer.encode(text).ids != list(ids)
    assert base.table.token_bytes(tokens[0].id) == b""
    assert one.token_bytes(tokens[0].id) == b"<tool>"
    assert (one.token_bytes(tokens[1].id), other.token_bytes(tokens[1].id)) == (b"", b"hello world")


def test_two_adapters_have_their_own_token_of_one_id() -> None:
    base = base_tokenizer("byte-level")
    first = base._tokenizer.get_vocab_size()
    tables = [base.table.extended([ours.AddedToken(id=first, content=text)]) for text in ("<left>", "<right>")]

    assert [streamed(table, [first, 5], skip_special_tokens=True)[:6] for table in tables] == ["<left>", "<right"]
    assert [table.tokenizer.encode("<left>", add_special_tokens=False).ids == [first] for table in tables] == [
        True,
        False,
    ]


def test_ids_that_no_token_has_stay_without_a_text() -> None:
    base = base_tokenizer("byte-level")
    first = base._tokenizer.get_vocab_size()
    table = base.table.extended([ours.AddedToken(id=first + 3, content="<far>")])

    assert table.tokenizer.encode("<far>", add_special_tokens=False).ids == [first + 3]
    assert [table.token_bytes(first + n) for n in range(5)] == [b"", b"", b"", b"<far>", b""]


def test_an_id_that_is_taken_is_refused() -> None:
    tokenizer = byte_level_tokenizer()
    with pytest.raises(ValueError, match="'<mine>' gets id"):
        extended_tokenizer(tokenizer, [ours.AddedToken(id=7, content="<mine>")])


def test_vocabulary_and_merges_are_shared() -> None:
    tokenizer = Tokenizer.from_str(byte_level_tokenizer().to_str())
    extended = extended_tokenizer(tokenizer, [ours.AddedToken(id=tokenizer.get_vocab_size(), content="<x>")])
    tokenizer.model.dropout = 1.0  # of the one model that both have

    assert extended.model.dropout == 1.0
