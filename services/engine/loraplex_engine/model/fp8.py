"""FP8 weights and activations in plain torch: e4m3 numbers times scales in fp32, and products of the two.

A weight has a scale for each output or for each block of 128 outputs and 128 inputs, an activation one for each token or for
each 128 inputs of a token: the largest number of the group becomes 448, the largest of e4m3. Products accumulate in fp32.

Source: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433; blocks as in DeepSeek-V3, arXiv:2412.19437.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraplex_engine.model.weight_form import FP8_BLOCK

E4M3: Final = torch.float8_e4m3fn
LARGEST: Final = 448.0
"""The largest finite number of e4m3."""
LEAST_SCALED: Final = 2.0**-100
"""A group's largest number counts as at least this: the inverse of its scale stays finite, and zeros stay zeros."""
PRODUCT_ITEMS: Final = 4 << 20
"""Numbers of a weight that are widened at once for a product in plain torch."""


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight in e4m3.

    Attributes:
        codes: e4m3 ``[out_features, in_features]``.
        scales: fp32; what numbers are multiplied by: ``[out_features, 1]`` or, of blocks, ``[blocks of outputs, blocks of inputs]``.
        is_blocked: Whether scales belong to blocks; activations then have one for each 128 inputs.
        dtype: The compute dtype.
    """

    codes: Tensor
    scales: Tensor
    is_blocked: bool
    dtype: torch.dtype

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.codes.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.codes.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows ``[first, last)`` of the weight in fp32."""
        values = self.codes[first:last].float()
        if not self.is_blocked:
            return values.mul_(self.scales[first:last])
        blocks = torch.arange(first, min(last, len(self.codes)), device=self.codes.device) // FP8_BLOCK
        each = self.scales[blocks].repeat_interleave(FP8_BLOCK, 1)
        return values.mul_(each[:, : values.shape[1]])


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 numbers and scales of groups that are the last dimension: ``values`` is their product, but for rounding.

    Args:
        values: ``[..., group]`` of any floating-point type. A group with a NaN or an infinity becomes NaN in the product.

    Returns:
        Numbers of the same shape, and scales fp32 ``[..., 1]``.
    """
    wide = values.float()
    largest = wide.abs().amax(-1, keepdim=True).clamp_min(LEAST_SCALED)
    limit = torch.full_like(largest, LARGEST)  # a division by a number may be a product with its rounded inverse
    codes = (wide * (limit / largest)).clamp_(-LARGEST, LARGEST).to(E4M3)
    return codes, largest / limit


def quantise_tokens(x: Tensor, *, is_blocked: bool) -> tuple[Tensor, Tensor]:
    """Return e4m3 numbers of activations, ``[tokens, features]``, and their scales, fp32 ``[tokens, 1 or ceil(features / 128)]``."""
    if not is_blocked:
        return quantise(x)
    tokens, features = x.shape
    padded = F.pad(x, (0, -features % FP8_BLOCK)).reshape(tokens, -1, FP8_BLOCK)
    codes, scales = quantise(padded)
    return codes.reshape(tokens, -1)[:, :features], scales[..., 0]


def widen(codes: Tensor, scales: Tensor) -> Tensor:
    """Return activations in fp32, ``[tokens, features]``, from what `quantise_tokens` returned."""
    each = scales if scales.shape[1] == 1 else scales.repeat_interleave(FP8_BLOCK, 1)[:, : codes.shape[1]]
    return codes.float() * each


class Fp8Linear:
    """A `Linear` of a weight in e4m3 that multiplies as the device does, in plain torch: the reference of `ScaledMmLinear`."""

    def __init__(self, weight: Fp8Weight, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.weight.out_features

    @property
    def weight_bytes(self) -> int:
        """See `Linear`."""
        return self.weight.nbytes

    def rows(self, first: int, last: int) -> Tensor:
        """See `Linear`: unpacked."""
        return self.weight.rows(first, last).to(self.weight.dtype)

    def multiply(self, x: Tensor, out: Tensor) -> None:
        """See `Linear`; ``out`` has either memory order."""
        out.copy_(self._product(x))

    def into(self, x: Tensor, out: Tensor) -> None:
        """See `Linear`; ``out`` has either memory order."""
        product = self._product(x)
        out.copy_(product if self.bias is None else product.add_(self.bias))

    def onto(self, x: Tensor, out: Tensor) -> None:
        """See `Linear`; ``out`` has either memory order."""
        product = self._product(x)
        out.add_(product if self.bias is None else product.add_(self.bias))

    def _product(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T`` in fp32, some rows of W at a time."""
        wide = widen(*quantise_tokens(x, is_blocked=self.weight.is_blocked))
        product = torch.empty((len(x), self.out_features), dtype=torch.float32, device=x.device)
        step = max(FP8_BLOCK, PRODUCT_ITEMS // self.in_features)
        for first in range(0, self.out_features, step):
            torch.mm(wide, self.weight.rows(first, first + step).t(), out=product[:, first : first + step])
        return product
