"""Decides which tokens end an output, by one rule for engine and gateway."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraplex_common.base_model import BaseModelError
from loraplex_common.tokenizer_config import read_json_object, read_special_tokens, read_tokenizer_config

if TYPE_CHECKING:
    from pathlib import Path


def read_eos_token_ids(directory: Path, vocab_size: int) -> tuple[int, ...]:
    """Return a base model's end-of-text ids, without duplicates.

    They are those of generation_config.json, or of config.json if that file is missing or has none (null), then the
    tokenizer's own end-of-text token: chat templates end a turn with it, and users of transformers and vLLM expect an
    output to end there. Ids beyond the vocabulary are left out, as no model draws them.

    Args:
        directory: Model directory.
        vocab_size: Rows of the model's embedding.

    Raises:
        BaseModelError: If a file is not a JSON object, or an id is not an integer.
    """
    ids = _of_model(directory)
    if (own := _of_tokenizer(directory)) is not None:
        ids = [*ids, own]
    return tuple(dict.fromkeys(token_id for token_id in ids if 0 <= token_id < vocab_size))


def _of_model(directory: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        eos = read_json_object(directory / name).get("eos_token_id")
        if eos is None:
            continue
        ids = eos if isinstance(eos, list) else [eos]
        if not all(type(token_id) is int for token_id in ids):
            raise BaseModelError(
                f"{directory / name}: eos_token_id {eos!r} is not an integer or a list of integers; correct the file"
            )
        return ids
    return []


def _of_tokenizer(directory: Path) -> int | None:
    """Return the id of the tokenizer's eos_token; None if it names none, or an unknown token."""
    token = read_special_tokens(read_tokenizer_config(directory)).get("eos_token")
    return None if token is None else _token_id(read_json_object(directory / "tokenizer.json"), token)


def _token_id(tokenizer: dict[str, Any], content: str) -> int | None:
    for token in tokenizer.get("added_tokens") or ():
        if token.get("content") == content:
            return int(token["id"])
    vocab = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocab, list):  # Unigram: the position is the id
        return next((token_id for token_id, (piece, *_) in enumerate(vocab) if piece == content), None)
    token_id: int | None = vocab.get(content)
    return token_id
