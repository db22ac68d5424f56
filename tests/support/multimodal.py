"""Tiny random multimodal checkpoints, written by transformers itself, in both spellings of their tensors' names."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import load_file, save_file
from support.base_models import tiny_tokenizer_json
from support.families import FAMILIES, SIZES, VOCAB_SIZE, draw_weights
from transformers import AutoConfig, AutoModelForImageTextToText

if TYPE_CHECKING:
    from collections.abc import Mapping

_VISION: Final = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MULTIMODAL: Final[Mapping[str, tuple[str, str, Mapping[str, Any]]]] = {
    "gemma3": (
        "gemma3",
        "gemma3",
        {
            "vision_config": {**_VISION, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
            "tie_word_embeddings": True,
        },
    ),
    "mistral3": (
        "mistral3",
        "ministral3",
        {
            "vision_config": {**_VISION, "model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 8},
            "tie_word_embeddings": False,
        },
    ),
}
"""By name: transformers' ``model_type``, the family in `FAMILIES` of its text part, and what else its configuration says."""
WRITTEN, IN_MEMORY = "language_model.model.", "model.language_model."
"""What tensors of the text part begin with."""


@functools.cache
def multimodal_dir(name: str, spelling: str) -> Path:
    """Return the folder of a tiny model whose tensors are named as transformers writes them, or as it has them in memory."""
    model_type, family, changes = MULTIMODAL[name]
    text_type, text = FAMILIES[family]
    holder = tempfile.TemporaryDirectory()
    _HOLDERS.append(holder)
    directory = Path(holder.name)
    text_config = {**SIZES, **text, "model_type": text_type, "tie_word_embeddings": changes["tie_word_embeddings"]}
    torch.manual_seed(12)
    config = AutoConfig.for_model(model_type, text_config=text_config, image_token_index=VOCAB_SIZE - 1, **changes)
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    draw_weights(model)
    model.save_pretrained(directory)
    _respell(directory / "model.safetensors", spelling)
    (directory / "tokenizer.json").write_text(tiny_tokenizer_json(VOCAB_SIZE))
    return directory


_HOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def _respell(file: Path, spelling: str) -> None:
    tensors = load_file(file)
    save_file({_name(name, spelling): tensor for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def _name(name: str, spelling: str) -> str:
    """Return a tensor's name in a spelling."""
    if name.startswith((WRITTEN, IN_MEMORY)):
        return spelling + name.removeprefix(WRITTEN).removeprefix(IN_MEMORY)
    is_head = "lm_head" in name
    bare = name.removeprefix("language_model.") if is_head else name.removeprefix("model.")
    prefix = "language_model." if is_head and spelling == WRITTEN else ""
    return prefix + bare if is_head or spelling == WRITTEN else f"model.{bare}"
