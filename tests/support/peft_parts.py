"""Adapters of peft's other tuners on a small model: random values, their parts as the engine takes them, and peft's logits."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec, Tensors
from loraplex_common.low_rank import LowRank
from loraplex_common.sparse_delta import SparseDelta
from loraplex_common.vectors import Bias, InVector, OutVector
from peft import IA3Config, LoraConfig, ShiraConfig, get_peft_model
from support.adapter_algebra import dense_of, random_part
from support.adapters import module_name
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loraplex_common.part_kind import Arrays, Part
    from numpy.typing import NDArray

    Parts = list[tuple[Part, Arrays]]

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TUNERS = ("lora", "dora", "lora_bias", "ia3", "shira", "flora")
"""FLoRA is none of peft's: plain torch computes it."""


@dataclass(frozen=True)
class TunedModel:
    """One model with one adapter, in fp32."""

    model: Any
    spec: AdapterSpec
    tensors: Tensors


class FloraLinear(torch.nn.Module):
    """``(W o (B A)) x + bias`` in plain torch."""

    def __init__(self, base: Any, arrays: Arrays) -> None:
        super().__init__()
        a, b = (torch.from_numpy(each) for each in arrays)
        self.weight, self.bias = base.weight.data * (b @ a), base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


class PeftTruth:
    """A base model and adapters of any tuners, each on a copy of its own; see `support.oracle.Oracle`.

    Attributes:
        tuned: By name of the adapter.
    """

    def __init__(self, model_dir: Path, tuners: Sequence[str], *, seed: int = 0) -> None:
        base: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
        self._base = base.eval()
        self.tuned = {
            f"{tuner}-{at}": _tune(copy.deepcopy(self._base), tuner, seed + at) for at, tuner in enumerate(tuners)
        }
        self._summed: dict[str, Any] = {}

    def add_sum(self, name: str, terms: Sequence[tuple[str, float]]) -> None:
        """Add an adapter that is the sum of others, each times its weight, merged by hand into a copy of the base."""
        model = copy.deepcopy(self._base)
        linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        for adapter, weight in terms:
            tuned = self.tuned[adapter]
            for module in tuned.spec.modules:
                linear = linears[module_name(module.layer, module.projection)]
                for part in module.parts:
                    arrays = tuned.tensors[module.layer, module.projection, part.kind]
                    _merge(linear, part, arrays, weight)
        self._summed[name] = model

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], adapter: str | None = None) -> NDArray[np.float32]:
        """Return the logits after each token, ``[tokens, vocab]``."""
        model = self._base if adapter is None else self._summed.get(adapter) or self.tuned[adapter].model
        found: NDArray[np.float32] = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0].numpy()
        return found

    def greedy(self, prompt: Sequence[int], num_tokens: int, adapter: str | None = None) -> list[int]:
        """Return the likeliest continuation."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens, adapter)[-1].argmax()))
        return tokens[len(prompt) :]


@torch.no_grad()
def _merge(linear: torch.nn.Linear, part: Part, arrays: Arrays, weight: float) -> None:
    if isinstance(part, LowRank):
        a, b = (torch.from_numpy(each) for each in arrays)
        linear.weight += weight * part.scaling * (b @ a)
    elif isinstance(part, SparseDelta):
        dense = dense_of(arrays, (linear.out_features, linear.in_features))
        linear.weight += torch.from_numpy(weight * part.scaling * dense).float()
    else:
        assert isinstance(part, Bias), part
        own = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
        linear.bias = torch.nn.Parameter(own + weight * torch.from_numpy(arrays[0]))


def _tune(model: Any, tuner: str, seed: int) -> TunedModel:
    rng = np.random.default_rng(seed)
    targets = sorted(rng.choice(LINEARS, int(rng.integers(2, len(LINEARS) + 1)), replace=False).tolist())
    torch.manual_seed(seed)
    if tuner == "flora":
        found = _put_flora(model, targets, rng)
    else:
        model = get_peft_model(model, _config(tuner, targets, rng)).eval()
        found = {name: _parts_of(module, tuner, rng) for name, module in model.named_modules() if _is_tuned(module)}
    modules: list[ModuleSpec] = []
    tensors: dict[tuple[int, str, str], Arrays] = {}
    for name, parts in found.items():
        match = re.search(r"layers\.(\d+)\.\w+\.(\w+)$", name)
        assert match is not None, name
        layer, projection = int(match[1]), match[2]
        modules.append(ModuleSpec(layer, projection, tuple(part for part, _ in parts)))
        tensors |= {(layer, projection, part.kind): arrays for part, arrays in parts}
    modules.sort(key=lambda module: module.layer)
    return TunedModel(model, AdapterSpec(f"{seed + 1:064x}", tuple(modules)), tensors)


def _config(tuner: str, targets: list[str], rng: np.random.Generator) -> Any:
    rank = int(rng.integers(1, 9))
    if tuner == "ia3":
        return IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    if tuner == "shira":
        return ShiraConfig(r=int(rng.integers(1, 4)), target_modules=targets)
    return LoraConfig(
        r=rank,
        lora_alpha=int(rng.integers(1, 2 * rank + 1)),
        target_modules=targets,
        use_dora=tuner == "dora",
        lora_bias=tuner == "lora_bias",
    )


def _is_tuned(module: Any) -> bool:
    return any(hasattr(module, name) for name in ("lora_A", "ia3_l", "shira_weight")) and hasattr(module, "base_layer")


def _array(values: torch.Tensor) -> NDArray[np.float32]:
    return values.detach().float().numpy().copy()


def _parts_of(module: Any, tuner: str, rng: np.random.Generator) -> Parts:
    """Give a module random values, and return them as parts."""
    with torch.no_grad():
        if tuner == "ia3":
            vector = module.ia3_l["default"]
            vector.copy_(1 + torch.randn_like(vector) / 2)
            part = InVector() if module.is_feedforward else OutVector(scales_bias=True)
            return [(part, (_array(vector.flatten()),))]
        if tuner == "shira":
            return [_sparse_part(module)]
        return _lora_parts(module, tuner, rng)


def _lora_parts(module: Any, tuner: str, rng: np.random.Generator) -> Parts:
    a, b, scaling = module.lora_A["default"], module.lora_B["default"], float(module.scaling["default"])
    b.weight.copy_(torch.randn_like(b.weight) * (0.5 / (scaling * b.weight.shape[1] ** 0.5)))
    parts: Parts = [(LowRank(a.weight.shape[0], scaling), (_array(a.weight), _array(b.weight)))]
    if tuner == "lora_bias":
        b.bias.copy_(torch.randn_like(b.bias) / 2)
        parts.append((Bias(), (_array(b.bias) * np.float32(scaling),)))
    if tuner == "dora":
        magnitudes = module.lora_magnitude_vector["default"].weight
        signs = rng.choice([-1.0, 1.0], len(magnitudes), p=[0.1, 0.9])
        magnitudes.mul_(torch.from_numpy(rng.uniform(0.5, 1.5, len(magnitudes)) * signs).float())
        parts.append((OutVector(is_magnitude=True), (_array(magnitudes),)))
    return parts


def _sparse_part(module: Any) -> tuple[Part, Arrays]:
    weights, (rows, columns) = module.shira_weight["default"], module.shira_indices["default"].long()
    weights.copy_(torch.randn_like(weights) / 8)
    order = torch.argsort(rows * module.in_features + columns)
    starts = np.searchsorted(rows[order].numpy(), np.arange(module.out_features + 1)).astype(np.int32)
    arrays = (_array(weights[order]), columns[order].numpy().astype(np.int32), starts)
    return SparseDelta(len(weights), float(module.scaling["default"])), arrays


def _put_flora(model: Any, targets: list[str], rng: np.random.Generator) -> dict[str, Parts]:
    found: dict[str, Parts] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets:
            weight = _array(module.weight)
            found[name] = [random_part("flora", weight.shape[::-1], rng, weight)]
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FloraLinear(module, found[name][0][1]))
    return found
