"""One model with one LoRA adapter on the CPU, each projection computed apart, merged or unmerged, rounded as engines round."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from pathlib import Path

WAYS: Final = ("base", "apart", "merged", "unmerged")


class AdaptedLinear(nn.Module):
    """A projection with a pair; products in fp32 of values that bf16 holds, one rounding at the end.

    Args:
        weight: The base's, ``[out, in]``, values that ``dtype`` holds.
        a: ``[rank, in]``.
        b: ``[out, rank]``.
        scaling: Its factor.
        dtype: Type of activations and of merged weights.

    Attributes:
        way: One of `WAYS`.
    """

    def __init__(
        self, weight: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__()
        self._weight, self._a, self._b = (each.to(dtype).float() for each in (weight, a, b))
        self._scaling, self._dtype = scaling, dtype
        self.delta = self._scaling * self._b @ self._a
        self.exact = self._weight + self.delta
        self.merged = self.exact.to(dtype).float()
        self.way = "apart"

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., out]`` of ``x [..., in]``."""
        wide = x.float()
        y = wide @ (self._weight if self.way in ("base", "apart") else self.merged).T
        if self.way in ("apart", "unmerged"):
            pair = self._scaling * ((wide @ self._a.T) @ self._b.T)
            y = y + pair if self.way == "apart" else y - pair
        return y.to(self._dtype)


class AdaptedModel:
    """A causal language model in bf16 whose adapted projections are `AdaptedLinear`.

    Args:
        model_dir: The base.
        adapter_dir: A PEFT checkpoint of plain LoRA.
    """

    def __init__(self, model_dir: Path, adapter_dir: Path) -> None:
        from transformers import AutoModelForCausalLM

        factory: Any = AutoModelForCausalLM  # untyped
        self._model: Any = factory.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
        config = json.loads((adapter_dir / "adapter_config.json").read_text())
        tensors = load_file(adapter_dir / "adapter_model.safetensors")
        self._adapted: list[AdaptedLinear] = []
        for name, a in tensors.items():
            if not name.endswith(".lora_A.weight"):
                continue
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")]
            parent, _, child = path.rpartition(".")
            module = self._model.get_submodule(path)
            adapted = AdaptedLinear(module.weight.detach(), a, b, config["lora_alpha"] / config["r"])
            setattr(self._model.get_submodule(parent), child, adapted)
            self._adapted.append(adapted)

    def rounding(self) -> float:
        """Return the norm of what bf16 takes from all merged weights, as a share of the norm of all deltas."""
        lost = sum(float((each.exact - each.merged).square().sum()) for each in self._adapted)
        return float((lost / sum(float(each.delta.square().sum()) for each in self._adapted)) ** 0.5)

    def generate(self, way: str, prompt: list[int], num_tokens: int) -> list[int]:
        """Return greedy tokens, computed one at a time."""
        self._choose(way)
        with torch.inference_mode():
            found: list[int] = []
            ids, cache = torch.tensor([prompt]), None
            for _ in range(num_tokens):
                out = self._model(input_ids=ids, past_key_values=cache, use_cache=True)
                found.append(int(out.logits[0, -1].float().argmax()))
                ids, cache = torch.tensor([found[-1:]]), out.past_key_values
        return found

    def logits(self, way: str, tokens: list[int]) -> Tensor:
        """Return the logits at every place of some tokens, fp32 ``[tokens, vocabulary]``, computed as one prompt."""
        self._choose(way)
        with torch.inference_mode():
            found: Tensor = self._model(input_ids=torch.tensor([tokens])).logits[0].float()
        return found

    def _choose(self, way: str) -> None:
        for each in self._adapted:
            each.way = way
