"""Random weights made on the device: a model of any shape without files, for benchmarks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from loraplex_engine.model.fp8 import Fp8Weight, quantise
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_engine.model.linear import Linear, LinearForms, StoredLinear


class RandomWeights:
    """A `WeightSource` of normal values scaled to keep activations near 1; norms are ones, biases zeros."""

    def __init__(self, *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a new random weight."""
        if len(shape) == 1:
            value = 0.0 if name.endswith("bias") else 1.0
            return torch.full(shape, value, dtype=self._dtype, device=self._device)
        std = 1.0 if "embed" in name else 1 / math.sqrt(shape[1])
        weight = torch.empty(shape, dtype=self._dtype, device=self._device)
        return weight.normal_(0, std, generator=self._generator)

    def linear(self, parts: Sequence[StoredLinear], forms: LinearForms) -> Linear:
        """Return linear layers stacked along their outputs."""
        weight, bias = torch.cat([self.read(part.weight, part.weight_shape) for part in parts]), None
        if parts[0].has_bias:
            bias = torch.cat([self.read(part.bias, (part.out_features,)) for part in parts])
        if forms.fp8 is None:
            return forms.dense(weight, bias)
        return forms.fp8(Fp8Weight(*quantise(weight), is_blocked=False, dtype=self._dtype), bias)

    def has(self, name: str) -> bool:
        """Tell that there is any weight asked for."""
        return True

    def close(self) -> None:
        """Nothing is open."""
