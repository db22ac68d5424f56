"""Random adapters of every served method: written by PEFT, read as the store reads them, and PEFT's own logits of them."""

from __future__ import annotations

import json
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, ShiraConfig, VeraConfig
from safetensors.numpy import load_file, save_file
from support.oracle import Oracle, adapter_image
from support.peft_methods import base_dir, base_info, base_model, save_trained

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from loraplex_common.adapter_image import AdapterSpec, Geometry
    from numpy.typing import NDArray

INVOCATION: Final = (7, 9, 8)
LINEARS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STD: Final = 0.15


class AdapterOfMethod:
    """One adapter and what PEFT makes of it.

    Args:
        folder: Its files.
        base: Name of its base among `support.peft_methods.BASES`.
    """

    def __init__(self, folder: Path, base: str) -> None:
        self._folder, self._base = folder, base

    def image(self, geometry: Geometry) -> tuple[AdapterSpec, NDArray[np.uint8]]:
        """Return spec and image, as an engine of that geometry gets them."""
        return adapter_image(geometry, base_info(self._base), self._folder, base_dir(self._base))

    def logits(self, token_ids: Sequence[int], adapter: str | None = None) -> NDArray[np.float32]:
        """Return PEFT's logits after each token, ``[tokens, vocab]``."""
        del adapter
        return self._oracle.logits(token_ids, "its")

    @cached_property
    def _oracle(self) -> Oracle:
        return Oracle(base_dir(self._base), {"its": self._folder})


class FloraAdapter(AdapterOfMethod):
    """FLoRA, which PEFT has not: plain torch with ``W o (B A)`` in the place of W."""

    def logits(self, token_ids: Sequence[int], adapter: str | None = None) -> NDArray[np.float32]:
        """See `AdapterOfMethod`."""
        del adapter
        with torch.inference_mode():
            found: NDArray[np.float32] = self._model(torch.tensor([list(token_ids)]), use_cache=False).logits[0].numpy()
        return found

    @cached_property
    def _model(self) -> Any:
        model, tensors = base_model(self._base), load_file(self._folder / "adapter_model.safetensors")
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                b = tensors[name.replace("lora_A", "lora_B")]
                path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                with torch.no_grad():
                    model.get_submodule(path).weight.mul_(torch.from_numpy(b @ a))
        return model


def _targets(rng: np.random.Generator) -> list[str]:
    return sorted(rng.choice(LINEARS, int(rng.integers(1, len(LINEARS) + 1)), replace=False).tolist())


def _lora(rng: np.random.Generator, **more: Any) -> LoraConfig:
    rank = int(rng.integers(1, 9))
    return LoraConfig(
        r=rank,
        lora_alpha=int(rng.integers(1, 2 * rank + 1)),
        use_rslora=bool(rng.integers(2)),
        target_modules=_targets(rng),
        **more,
    )


_CONFIGS: Final[dict[str, Callable[[np.random.Generator], Any]]] = {
    "lora": _lora,
    "dora": lambda rng: _lora(rng, use_dora=True),
    "lora_bias": lambda rng: _lora(rng, lora_bias=True),
    "biases": lambda rng: _lora(rng, bias="all", use_dora=bool(rng.integers(2))),
    "alora": lambda rng: _lora(rng, alora_invocation_tokens=list(INVOCATION)),
    "adalora": lambda rng: AdaLoraConfig(init_r=int(rng.integers(1, 7)), target_modules=_targets(rng), total_step=10),
    "vera": lambda rng: VeraConfig(r=int(rng.integers(1, 9)), target_modules=_targets(rng)),
    "ia3": lambda _: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "shira": lambda rng: ShiraConfig(r=int(rng.integers(1, 3)), target_modules=_targets(rng), random_seed=3),
}
METHODS: Final = (*_CONFIGS, "flora")


def write_adapters(folder: Path, base: str, rng: np.random.Generator) -> dict[str, AdapterOfMethod]:
    """Write a random adapter of each of `METHODS`."""
    adapters: dict[str, AdapterOfMethod] = {}
    for method, make in _CONFIGS.items():
        config = make(rng)
        config.task_type = "CAUSAL_LM"
        save_trained(folder / method, base, config, seed=int(rng.integers(1 << 30)), std=STD)
        adapters[method] = AdapterOfMethod(folder / method, base)
    _write_flora(folder / "flora", base, rng)
    return adapters | {"flora": FloraAdapter(folder / "flora", base)}


def _write_flora(folder: Path, base: str, rng: np.random.Generator) -> None:
    rank, targets, tensors = int(rng.integers(1, 9)), _targets(rng), dict[str, "NDArray[np.float32]"]()
    for layer, offered in enumerate(base_info(base).layers):
        for each in offered:
            if each.name not in targets:
                continue
            a, b = (
                (rng.standard_normal(shape) * STD).astype(np.float32)
                for shape in ((rank, each.in_features), (each.out_features, rank))
            )
            a[0] += 1
            b[:, 0] += 1
            prefix = f"base_model.model.model.layers.{layer}.{each.path}"
            tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    folder.mkdir(parents=True)
    config = {"peft_type": "FLORA", "r": rank, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
