"""Tokenizers with tokens that an adapter adds, as transformers saves them beside its weights."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.base_models import TinyBase, tiny_tokenizer_json, write_base_model
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import AddedToken

NUM_TOKENS = 300
"""Tokens of the padded base model; its embedding has 384 rows."""


@functools.cache
def padded_base_dir() -> Path:
    """Return a tiny base model whose embedding has more rows than its tokenizer has tokens, named ``padded``."""
    directory = write_base_model(Path(tempfile.mkdtemp(prefix="loraplex-padded-")) / "padded", TinyBase())
    (directory / "tokenizer.json").write_text(tiny_tokenizer_json(NUM_TOKENS))
    return directory


def extended_by_transformers(base: Path, tokens: Sequence[AddedToken]) -> Any:
    """Return transformers' tokenizer of a base model with tokens added; the oracle."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def saved(tokenizer: Any, directory: Path) -> dict[str, bytes]:
    """Return the files that transformers saves of a tokenizer."""
    tokenizer.save_pretrained(directory)
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}
