"""The CUDA backend's linear layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from loraplex_engine.model.linear import LinearForms

if TYPE_CHECKING:
    from torch import Tensor


class CublasDense:
    """A `Linear` of a weight in the compute dtype: one cuBLAS call a product.

    Attributes:
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]`` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self._weight_t = weight.t()

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
        """See `Linear`."""
        torch.mm(x, self._weight_t, out=out)

    def into(self, x: Tensor, out: Tensor) -> None:
        """See `Linear`."""
        if self.bias is None:
            torch.mm(x, self._weight_t, out=out)
        else:
            torch.addmm(self.bias, x, self._weight_t, out=out)

    def onto(self, x: Tensor, out: Tensor) -> None:
        """See `Linear`; for cuBLAS the same work as `into`, rounded once less."""
        torch.addmm(out, x, self._weight_t, out=out)
        if self.bias is not None:
            out.add_(self.bias)


CUDA_LINEARS: Final = LinearForms(dense=CublasDense)
