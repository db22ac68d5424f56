"""Dense layers and norms on activations of either memory order.

Activations are ``[tokens, features]`` views everywhere. On a CPU in fp32 a step of a few dozen tokens is faster with
the product computed as ``W @ x.T`` in blocks of outputs (docs/adr/0010-gemm-orientation.md), whose result lies
feature-major in memory. So a buffer is either *token-major* (last dimension contiguous) or *feature-major* (first
dimension contiguous); `new_activation` decides, strides tell, and elementwise code need not know.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from loraplex_engine.model.fp8 import Fp8Linear
from loraplex_engine.model.linear import LinearForms

OUTPUT_BLOCK: Final = 32  # rows of W per small product: measured best of 16 to 576
MIN_FEATURE_MAJOR_TOKENS: Final = 3  # below, a matrix-vector product reads W at full memory bandwidth
MAX_FEATURE_MAJOR_TOKENS: Final = 256  # above, both orientations are bound by arithmetic


def is_feature_major(num_tokens: int, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Choose the memory order of a step's activations; see docs/adr/0010-gemm-orientation.md for the numbers."""
    is_small = MIN_FEATURE_MAJOR_TOKENS <= num_tokens <= MAX_FEATURE_MAJOR_TOKENS
    return device.type == "cpu" and dtype == torch.float32 and is_small


def new_activation(num_tokens: int, num_features: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised ``[num_tokens, num_features]`` in the memory order that suits the dense layers."""
    if is_feature_major(num_tokens, dtype=dtype, device=device):
        return torch.empty((num_features, num_tokens), dtype=dtype, device=device).t()
    return torch.empty((num_tokens, num_features), dtype=dtype, device=device)


class Dense:
    """The torch backend's `Linear` of a weight in the compute dtype.

    Attributes:
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]`` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self._weight_t = weight.t()
        self._blocks = (
            weight.view(-1, OUTPUT_BLOCK, self.in_features) if self.out_features % OUTPUT_BLOCK == 0 else None
        )

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.weight.shape[0]

    @property
    def weight_bytes(self) -> int:
        """See `Linear`."""
        return self.weight.nbytes

    def rows(self, first: int, last: int) -> Tensor:
        """See `Linear`: a view."""
        return self.weight[first:last]

    def multiply(self, x: Tensor, out: Tensor) -> None:
        """See `Linear`; ``out`` comes from `new_activation`."""
        if out.is_contiguous():
            torch.mm(x, self._weight_t, out=out)
        elif self._blocks is not None:
            num_blocks, num_tokens = self._blocks.shape[0], x.shape[0]
            x_t = x.t().expand(num_blocks, -1, -1)
            torch.bmm(self._blocks, x_t, out=out.t().view(num_blocks, OUTPUT_BLOCK, num_tokens))
        else:
            torch.mm(self.weight, x.t(), out=out.t())

    def into(self, x: Tensor, out: Tensor) -> None:
        """See `Linear`; ``out`` comes from `new_activation`."""
        self.multiply(x, out)
        if self.bias is not None:
            out.add_(self.bias)

    def onto(self, x: Tensor, out: Tensor) -> None:
        """See `Linear`; ``out`` comes from `new_activation`."""
        if out.is_contiguous():
            out.addmm_(x, self._weight_t)
        elif self._blocks is not None:
            num_blocks, num_tokens = self._blocks.shape[0], x.shape[0]
            x_t = x.t().expand(num_blocks, -1, -1)
            out.t().view(num_blocks, OUTPUT_BLOCK, num_tokens).baddbmm_(self._blocks, x_t)
        else:
            out.t().addmm_(self.weight, x.t())
        if self.bias is not None:
            out.add_(self.bias)


TORCH_LINEARS = LinearForms(dense=Dense, fp8=Fp8Linear)


class RmsNorm:
    """Root-mean-square norm: ``x / rms(x) * (weight + offset)``, in fp32 inside.

    With an offset the result is rounded once, behind the product; without, before it, as in the families that have none.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.

    Attributes:
        weight: As stored, in the compute dtype.
        offset: Added to the weight in fp32.
    """

    def __init__(self, weight: Tensor, eps: float, offset: float = 0.0) -> None:
        self.weight, self.offset = weight, offset
        self._eps = eps
        self._ones = torch.ones((weight.shape[0], 1), device=weight.device)
        self._factor = weight.float() + offset if offset else None

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(self._eps).rsqrt_()
        if self._factor is not None:
            return (wide * scale).mul_(self._factor).to(x.dtype)
        return (wide * scale).to(x.dtype).mul_(self.weight)

    def into(self, x: Tensor, out: Tensor) -> None:
        """Normalise rows: ``out[:] = self(x)`` for ``[tokens, features]`` of the same memory order."""
        wide = x.float()
        squares = torch.mm(wide.square(), self._ones)  # a product is the fastest sum in either memory order
        scale = squares.mul_(1 / x.shape[1]).add_(self._eps).rsqrt_()
        if x.dtype == out.dtype == torch.float32:
            torch.mul(wide, scale, out=out).mul_(self.weight if self._factor is None else self._factor)
        elif self._factor is not None:
            out.copy_(wide.mul_(scale).mul_(self._factor))
        else:
            out.copy_(wide.mul_(scale)).mul_(self.weight)
