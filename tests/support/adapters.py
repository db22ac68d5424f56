"""Random PEFT adapter directories for any base model directory, with every setting that a loader must handle."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from loraplex_common.base_model import BaseModelInfo, load_base_model
from support.decoder_shapes import PROJECTIONS
from support.safetensors_files import safetensors_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

BLOCKS = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in PROJECTIONS}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One adapter.

    Attributes:
        layers: Adapted layers, written as ``layers_to_transform``; None means all.
        rank_pattern: PEFT's rank_pattern: suffix or regular expression of a module name -> rank.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        strength: Size of the adapter's contribution relative to the base projection's; 0.5 changes most outputs.
        config: Entries of adapter_config.json that replace those of the recipe.
    """

    rank: int = 8
    alpha: float = 16
    use_rslora: bool = False
    targets: tuple[str, ...] = PROJECTIONS
    layers: tuple[int, ...] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    dtype: str = "float32"
    strength: float = 0.5
    seed: int = 0
    base_model_name_or_path: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """Return a module's rank by PEFT's rule: the first pattern that matches the end of its dotted name."""
        return next(
            (rank for key, rank in self.rank_pattern.items() if re.match(rf"(.*\.)?({key})$", module)), self.rank
        )

    def scaling_of(self, module: str) -> float:
        """Return a module's scaling: alpha / rank, or alpha / sqrt(rank) under rsLoRA."""
        alpha = next((a for key, a in self.alpha_pattern.items() if re.match(rf"(.*\.)?({key})$", module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def module_name(layer: int, projection: str) -> str:
    """Return a module's dotted name in the base model."""
    return f"model.layers.{layer}.{BLOCKS[projection]}.{projection}"


def adapter_config(recipe: Recipe) -> dict[str, Any]:
    """Return adapter_config.json as PEFT writes it."""
    return {
        "base_model_name_or_path": recipe.base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": list(recipe.layers) if recipe.layers is not None else None,
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": recipe.rank,
        "rank_pattern": recipe.rank_pattern,
        "alpha_pattern": recipe.alpha_pattern,
        "target_modules": list(recipe.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": recipe.use_rslora,
    } | recipe.config


def adapter_tensors(base: BaseModelInfo, recipe: Recipe) -> dict[str, NDArray[np.float32]]:
    """Return random A and B for every adapted module under PEFT's names, in fp32 before rounding to the dtype."""
    rng = np.random.default_rng(recipe.seed)
    geometry = base.geometry(dtype="float32", page_bytes=4096)
    tensors: dict[str, NDArray[np.float32]] = {}
    for layer in range(base.num_layers) if recipe.layers is None else recipe.layers:
        for projection in recipe.targets:
            module = module_name(layer, projection)
            inputs, outputs = geometry.projection(0, projection).shape
            rank = recipe.rank_of(module)
            b_std = recipe.strength / (recipe.scaling_of(module) * math.sqrt(rank))
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = (rng.standard_normal((rank, inputs)) / math.sqrt(inputs)).astype(
                np.float32
            )
            tensors[f"{prefix}.lora_B.weight"] = (rng.standard_normal((outputs, rank)) * b_std).astype(np.float32)
    return tensors


def adapter_files(base_dir: Path, recipe: Recipe | None = None) -> dict[str, bytes]:
    """Return the two files of an adapter, for uploads."""
    recipe = recipe or Recipe()
    tensors = adapter_tensors(load_base_model(base_dir), recipe)
    return {
        "adapter_config.json": json.dumps(adapter_config(recipe), indent=1).encode(),
        "adapter_model.safetensors": safetensors_bytes(tensors, recipe.dtype),
    }


def write_adapter(directory: Path, base_dir: Path, recipe: Recipe | None = None) -> Path:
    """Write a PEFT adapter directory for the base model in ``base_dir``.

    Returns:
        ``directory``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in adapter_files(base_dir, recipe).items():
        (directory / name).write_bytes(data)
    return directory


def random_recipe(rng: np.random.Generator, num_layers: int, *, max_rank: int = 64, base_model: str = "") -> Recipe:
    """Draw a recipe: rank, targets, layers, patterns, scaling rule and dtype all vary."""
    targets = tuple(name for name in PROJECTIONS if rng.random() < 0.6) or ("q_proj",)
    layers = tuple(layer for layer in range(num_layers) if rng.random() < 0.7) or (0,)
    rank = int(rng.integers(1, max_rank + 1))
    return Recipe(
        rank=rank,
        alpha=int(rng.integers(1, 2 * rank + 2)),
        use_rslora=bool(rng.random() < 0.3),
        targets=targets,
        layers=None if rng.random() < 0.3 else layers,
        rank_pattern={targets[0]: int(rng.integers(1, max_rank + 1))} if rng.random() < 0.5 else {},
        alpha_pattern={targets[-1]: int(rng.integers(1, 33))} if rng.random() < 0.3 else {},
        dtype=str(rng.choice(["float32", "float16", "bfloat16"])),
        seed=int(rng.integers(1 << 30)),
        base_model_name_or_path=base_model,
    )
