"""A checkpoint of random FP8 weights in files, made from a seed: for measurements that read one."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any, Final

import torch
from loraplex_common.architectures.registry import model_config
from loraplex_engine.model.fp8 import quantise
from safetensors.torch import save_file

from loraplex_bench.synthetic_tokenizer import write_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_common.base_model import BaseModelInfo
    from torch import Tensor

LAYERS_PER_FILE: Final = 4
_NUMBERS: Final = {"num_bits": 8, "type": "float", "symmetric": True}
SETTINGS: Final[dict[str, Any]] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_NUMBERS, "strategy": "channel", "dynamic": False},
            "input_activations": {**_NUMBERS, "strategy": "token", "dynamic": True},
        }
    },
}
"""``quantization_config``: a scale for each output, activations quantised per token."""


def write_fp8_checkpoint(folder: Path, info: BaseModelInfo, *, device: torch.device, seed: int = 0) -> Path:
    """Write a Llama's config.json, tokenizer.json and safetensors files.

    Args:
        folder: Made here.
        info: The model's shape; its biases, if any, are not written.
        device: Where the numbers are drawn.
        seed: Two checkpoints of one seed and device are equal.

    Returns:
        ``folder``.
    """
    write_tokenizer(folder, info.vocab_size)
    (folder / "config.json").write_text(json.dumps(info.config | {"quantization_config": SETTINGS}), encoding="utf-8")
    draw = _Draw(info, device, seed)
    weight_map: dict[str, str] = {}
    for begin in range(0, info.num_layers, LAYERS_PER_FILE):
        tensors = draw.outside() if begin == 0 else {}
        for layer in range(begin, min(begin + LAYERS_PER_FILE, info.num_layers)):
            tensors |= draw.layer(layer)
        name = f"model-{begin // LAYERS_PER_FILE + 1:05d}.safetensors"
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


class _Draw:
    """Tensors of a Llama, drawn in order."""

    def __init__(self, info: BaseModelInfo, device: torch.device, seed: int) -> None:
        self._info, self._device = info, device
        self._names = model_config(info.config).names
        self._generator = torch.Generator(device).manual_seed(seed)

    def outside(self) -> dict[str, Tensor]:
        """Return embedding, lm_head and the last norm, in bf16."""
        shape = (self._info.vocab_size, self._info.hidden_size)
        names = self._names
        return {
            names.embedding: self._normal(shape, 1.0).cpu(),
            f"{names.lm_head}.weight": self._normal(shape, 1 / math.sqrt(shape[1])).cpu(),
            names.final_norm: self._ones(),
        }

    def layer(self, layer: int) -> dict[str, Tensor]:
        """Return the tensors of a layer: e4m3 numbers and fp32 scales, norms in bf16."""
        names = self._names
        found = {names.in_layer(layer, name): self._ones() for name in (names.input_norm, names.post_norm)}
        for each in self._info.layers[layer]:
            codes, scales = quantise(
                self._normal((each.out_features, each.in_features), 1 / math.sqrt(each.in_features))
            )
            module = names.in_layer(layer, each.path)
            found |= {f"{module}.weight": codes.cpu(), f"{module}.weight_scale": scales.cpu()}
        return found

    def _normal(self, shape: tuple[int, int], std: float) -> Tensor:
        empty = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        return empty.normal_(0, std, generator=self._generator)

    def _ones(self) -> Tensor:
        return torch.ones(self._info.hidden_size, dtype=torch.bfloat16)


def forget_files(folder: Path) -> None:
    """Write files to the disk and drop them from the page cache, so that they are read from the disk next."""
    for path in sorted(folder.iterdir()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
