"""Random weights made on the device: a model of any shape without files, for benchmarks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from loraplex_engine.model.fp8 import Fp8Weight, quantise
from loraplex_engine.model.weight_form import FP8_BLOCK
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_engine.model.linear import Linear, LinearForms, StoredLinear


class RandomWeights:
    """A `WeightSource` of normal values scaled to keep activations near 1; norms are ones, biases zeros.

    Args:
        dtype: Type of whole weights.
        device: Where the weights are.
        seed: Seed of the random numbers.
        has_blocks: Whether scales of FP8 weights are those of blocks of 128 x 128, not those of outputs.
        absent: Names of weights that there are none of.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
        has_blocks: bool = False,
        absent: tuple[str, ...] = (),
    ) -> None:
        self._dtype, self._device = dtype, device
        self._has_blocks, self._absent = has_blocks, absent
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
        quantised = quantise_blocks(weight) if self._has_blocks else quantise(weight)
        return forms.fp8(Fp8Weight(*quantised, is_blocked=self._has_blocks, dtype=self._dtype), bias)

    def has(self, name: str) -> bool:
        """Tell that there is any weight asked for, but for those that are absent."""
        return name not in self._absent

    def close(self) -> None:
        """Nothing is open."""


def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 numbers of a weight, ``[outputs, inputs]``, and fp32 scales of its blocks of 128 x 128."""
    outputs, inputs = weight.shape
    padded = F.pad(weight, (0, -inputs % FP8_BLOCK, 0, -outputs % FP8_BLOCK))
    high, wide = (size // FP8_BLOCK for size in padded.shape)
    blocks = padded.reshape(high, FP8_BLOCK, wide, FP8_BLOCK).transpose(1, 2).reshape(high, wide, -1)
    codes, scales = quantise(blocks)
    rows = codes.reshape(high, wide, FP8_BLOCK, FP8_BLOCK).transpose(1, 2).reshape(padded.shape)
    return rows[:outputs, :inputs].contiguous(), scales[..., 0]
