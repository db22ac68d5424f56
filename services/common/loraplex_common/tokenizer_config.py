"""Reads the files beside tokenizer.json that describe special tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from loraplex_common.base_model import BaseModelError
from loraplex_common.config_values import parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SPECIAL_TOKENS: Final = (
    *("bos_token", "eos_token", "unk_token", "sep_token"),
    *("pad_token", "cls_token", "mask_token"),
)


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, with special tokens of special_tokens_map.json if it has none itself.

    It follows transformers: a configuration that lists its added tokens needs no such map, and the map is not read.

    Raises:
        BaseModelError: If a file is not a JSON object.
    """
    config = read_json_object(directory / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    tokens = read_json_object(directory / "special_tokens_map.json")
    return {**config, **{name: tokens.get(name) for name in SPECIAL_TOKENS if config.get(name) is None}}


def read_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens of a tokenizer_config.json, which writes them as strings or objects."""
    tokens = {}
    for name in SPECIAL_TOKENS:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def read_json_object(file: Path) -> dict[str, Any]:
    """Return a file's JSON object; an empty one if there is no such file.

    Raises:
        BaseModelError: If the file is something else.
    """
    if not file.exists():
        return {}
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise BaseModelError(f"{file}: expected a JSON object")
    return content
