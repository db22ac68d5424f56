"""Tokens that the files beside an adapter add are read as transformers reads them; what else differs is refused by name."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_adapter_store.checkpoint.added_tokens import check_rows
from loraplex_adapter_store.checkpoint.reader import read_checkpoint
from loraplex_adapter_store.checkpoint.tokenizer_files import check_tokenizer_files
from loraplex_common.added_tokens import AddedToken as Added
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import AdapterIncompatibleError
from loraplex_common.text_parts import TextParts
from support.added_tokens import NUM_TOKENS, extended_by_transformers, padded_base_dir, saved
from support.outside_adapters import OutsideTruth
from support.store_rig import tiny_base_dir
from tokenizers import AddedToken

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Fields = dict[str, Any]
FIRST = NUM_TOKENS
ROWS = 384


def tokenizer_json(change: Callable[[Fields], object], base: Path | None = None) -> dict[str, bytes]:
    fields = copy.deepcopy(json.loads(((base or padded_base_dir()) / "tokenizer.json").read_text()))
    change(fields)
    return {"tokenizer.json": json.dumps(fields).encode()}


def token(token_id: int, content: str, **flags: bool) -> Fields:
    off = dict.fromkeys(("special", "normalized", "lstrip", "rstrip", "single_word"), False)
    return {"id": token_id, "content": content, **off, **flags}


def adding(*tokens: Fields) -> Callable[[Fields], object]:
    return lambda fields: fields["added_tokens"].extend(tokens)


def config(**fields: Any) -> dict[str, bytes]:
    base = json.loads((padded_base_dir() / "tokenizer_config.json").read_text())
    return {"tokenizer_config.json": json.dumps(base | fields).encode()}


def added(files: dict[str, bytes], base: Path | None = None) -> tuple[Added, ...]:
    return check_tokenizer_files(files, base or padded_base_dir()).parts.added_tokens


def test_what_transformers_saves_brings_the_added_tokens_alone(tmp_path: Path) -> None:
    tokens = [AddedToken("<tool>", special=True), AddedToken("word", single_word=True, lstrip=True, normalized=True)]
    files = saved(extended_by_transformers(padded_base_dir(), tokens), tmp_path)

    parts = check_tokenizer_files(files, padded_base_dir()).parts

    assert parts.kinds == ("added_tokens",)
    assert parts.added_tokens == (
        Added(id=FIRST, content="<tool>", special=True),
        Added(id=FIRST + 1, content="word", single_word=True, lstrip=True, normalized=True),
    )
    assert TextParts.from_fields(json.loads(json.dumps(parts.to_fields()))) == parts


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            config(added_tokens_decoder={str(FIRST): token(FIRST, "<tool>", special=True, rstrip=True)}),
            Added(id=FIRST, content="<tool>", special=True, rstrip=True),
        ),
        (
            config(added_tokens_decoder={"380": token(380, "<far>")}),
            Added(id=380, content="<far>"),
        ),
        (
            {"added_tokens.json": b'{"<tool>": 300}'},
            Added(id=FIRST, content="<tool>", normalized=True),
        ),
        (
            {"added_tokens.json": b'{"<tool>": 300}'} | config(additional_special_tokens=["<tool>"]),
            Added(id=FIRST, content="<tool>", special=True),
        ),
        (
            {"added_tokens.json": b'{"[PAD]": 300}', "special_tokens_map.json": b'{"pad_token": "[PAD]"}'},
            Added(id=FIRST, content="[PAD]", special=True),
        ),
    ],
    ids=["decoder", "a gap within the rows", "old file", "old file and list", "old file and role"],
)
def test_files_without_a_tokenizer_add_to_the_base_models(files: dict[str, bytes], expected: Added) -> None:
    assert added(files) == (expected,)


def test_a_token_of_the_vocabulary_may_become_an_added_one() -> None:
    word = "\u0120the"
    files = tokenizer_json(lambda f: f["added_tokens"].append(token(f["model"]["vocab"][word], word)))

    (found,) = added(files)

    assert found.content == word


def test_the_adapters_end_may_be_one_of_its_own_tokens_and_its_template_may_write_it() -> None:
    files = tokenizer_json(adding(token(FIRST, "<end>", special=True)))
    files |= config(eos_token="<end>", chat_template="{{ messages[0].content }}{{ eos_token }}")

    parts = check_tokenizer_files(files, padded_base_dir()).parts

    assert parts.stop_token_ids == (FIRST,)
    assert parts.special_tokens == {"eos_token": "<end>"}


def test_tokens_behind_all_rows_go_on_where_the_rows_end() -> None:
    behind = tokenizer_json(adding(token(ROWS, "<a>"), token(ROWS + 1, "<b>")), tiny_base_dir())

    assert [each.id for each in added(behind, tiny_base_dir())] == [ROWS, ROWS + 1]


OTHER = {
    "an id that another token has": (
        config(added_tokens_decoder={"5": token(5, "<tool>")}),
        r"token '<tool>' \(id 5\) is not the base model's, whose id 5 is",
    ),
    "an id behind all rows without its neighbour": (
        config(added_tokens_decoder={str(ROWS + 1): token(ROWS + 1, "<tool>")}),
        r"'<tool>' \(id 385\) is added, but no token has id 384",
    ),
    "an id that the library does not give": (
        tokenizer_json(adding(token(FIRST + 9, "<tool>"))),
        r"token '<tool>' has id 309, but the tokenizers library gives it 300",
    ),
    "two files with other ids": (
        tokenizer_json(adding(token(FIRST, "<tool>")))
        | config(added_tokens_decoder={str(FIRST + 1): token(FIRST + 1, "<tool>")}),
        "token '<tool>' has id 301, in another file",
    ),
    "two files with another token": (
        tokenizer_json(adding(token(FIRST, "<tool>")))
        | config(added_tokens_decoder={str(FIRST): token(FIRST, "<fool>")}),
        "id 300 is token '<fool>', in another file '<tool>'",
    ),
    "another normaliser beside": (
        tokenizer_json(
            lambda f: (f.update(normalizer={"type": "Lowercase"}), f["added_tokens"].append(token(FIRST, "<tool>")))
        ),
        "it makes ids",
    ),
    "other merges beside": (
        tokenizer_json(lambda f: (f["model"]["merges"].reverse(), f["added_tokens"].append(token(FIRST, "<tool>")))),
        "its merges differ",
    ),
    "a token of the base that strips": (
        tokenizer_json(lambda f: (f["added_tokens"][2].update(rstrip=True), adding(token(FIRST, "<tool>"))(f))),
        "it makes ids",
    ),
    "a special token without an id": (config(additional_special_tokens=["<think>"]), "<think>"),
    "a long token": (
        config(added_tokens_decoder={str(FIRST): token(FIRST, "x" * 257)}),
        "an added token has 1 to 256 bytes",
    ),
}


@pytest.mark.parametrize(("files", "match"), OTHER.values(), ids=OTHER)
def test_any_other_difference_is_refused_by_name(files: dict[str, bytes], match: str) -> None:
    with pytest.raises(AdapterIncompatibleError, match=match):
        check_tokenizer_files(files, padded_base_dir())


def test_more_tokens_than_may_be_added_are_refused_with_the_number() -> None:
    tokens = {str(ROWS + n): token(ROWS + n, f"<{n}>") for n in range(1025)}
    with pytest.raises(AdapterIncompatibleError, match="it adds 1025 tokens to the base model's; at most 1024"):
        check_tokenizer_files(config(added_tokens_decoder=tokens), padded_base_dir())


@pytest.mark.parametrize("kind", ["saved", "trained", "resized"])
def test_tokens_behind_the_rows_need_a_row_of_the_adapter(kind: str, tmp_path: Path) -> None:
    truth = OutsideTruth(tiny_base_dir(), [kind])
    (adapter,) = truth.adapters.values()
    adapter.model.save_pretrained(tmp_path)
    base = load_base_model(tiny_base_dir())
    config, weights = ((tmp_path / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))
    modules = read_checkpoint(config, weights, base, base_dir=tiny_base_dir()).modules
    tokens = [Added(id=token_id, content=f"<{token_id}>") for token_id in adapter.added]
    inside = [Added(id=ROWS - 1, content="<inside>")]

    check_rows([*inside, *tokens], modules, base)
    check_rows(inside, (), base)
    missing = Added(id=ROWS + len(tokens), content="<no row>")
    with pytest.raises(
        AdapterIncompatibleError, match=r"'<no row>' \(id 387\).* has no row of embed_tokens for it: save"
    ):
        check_rows([*tokens, missing], modules, base)
    with pytest.raises(AdapterIncompatibleError, match="has no row of lm_head"):
        check_rows(tokens, [module for module in modules if module.projection != "lm_head"], base)
