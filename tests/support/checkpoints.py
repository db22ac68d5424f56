"""Reads a recipe's checkpoint after something in it has been changed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from loraplex_adapter_store.checkpoint.reader import Checkpoint, read_checkpoint
from support.adapters import Recipe, adapter_config, adapter_tensors
from support.safetensors_files import safetensors_bytes

if TYPE_CHECKING:
    from loraplex_common.base_model import BaseModelInfo


def read(base: BaseModelInfo, recipe: Recipe | None = None, *, change: Any = None, **config: Any) -> Checkpoint:
    """Read a recipe's checkpoint after ``change`` has edited its tensors and ``config`` its settings."""
    recipe = recipe or Recipe(targets=("q_proj", "down_proj"), rank=4)
    tensors = adapter_tensors(base, recipe)
    if change is not None:
        change(tensors)
    fields = adapter_config(recipe) | config
    return read_checkpoint(json.dumps(fields).encode(), safetensors_bytes(tensors, recipe.dtype), base)
