"""Rebuilds a Hugging Face byte-level BPE tokenizer from the fields of a GGUF file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from loraplex_client.demo.errors import ConversionError

if TYPE_CHECKING:
    from collections.abc import Mapping

CONTROL_TOKEN: Final = 3  # GGUF token type of markers such as <|im_end|>
DIGITS_ALONE: Final = {"type": "Digits", "individual_digits": True}
BYTE_LEVEL: Final = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# tokenizer.ggml.pre -> how text is cut before merges apply; llama.cpp keeps the rules in code, under these names.
PRE_TOKENIZERS: Final[Mapping[str, list[dict[str, Any]]]] = {
    "gpt-2": [BYTE_LEVEL],
    "smollm": [DIGITS_ALONE, BYTE_LEVEL],
}
SPECIAL_TOKEN_FIELDS: Final = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def tokenizer_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of tokenizer.json.

    Args:
        fields: GGUF metadata by key; needs ``tokenizer.ggml.{model, pre, tokens, merges, token_type}``.

    Raises:
        ConversionError: If the tokenizer is no byte-level BPE or its way of cutting text is unknown.
    """
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ConversionError(
            f"tokenizer {model!r} with pre-tokenizer {pre!r}: only 'gpt2' with one of {known} is known"
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    control = [i for i, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == CONTROL_TOKEN]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(token_id, tokens[token_id]) for token_id in control],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }


def special_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the entries ``bos_token``, ``eos_token``, ... of tokenizer_config.json."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    return {name: tokens[fields[key]] for name, key in SPECIAL_TOKEN_FIELDS.items() if key in fields}


def chat_template(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the entry ``chat_template`` of tokenizer_config.json, if the file has one."""
    template = fields.get("tokenizer.chat_template")
    return {"chat_template": template} if template else {}


def _added_token(token_id: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content, **flags}
