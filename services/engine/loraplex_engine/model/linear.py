"""What a decoder needs of a linear layer, in whatever form its weight is stored, and what makes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from loraplex_common.projections import Projection, Split
from torch import Tensor

if TYPE_CHECKING:
    from loraplex_engine.model.fp8 import Fp8Weight


class Linear(Protocol):
    """A linear layer ``y = x @ W.T + bias``; a backend has one class for each form of ``W`` that it computes with."""

    @property
    def in_features(self) -> int:
        """Width of the input."""
        ...

    @property
    def out_features(self) -> int:
        """Width of the output."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes that a product reads of ``W``, scales included, however few its tokens are; the bias is left out."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """The bias, ``[out_features]``, if there is one."""
        ...

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows ``[first, last)`` of ``W`` in the compute dtype, ``[last - first, in_features]``, as products read them."""
        ...

    def multiply(self, x: Tensor, out: Tensor) -> None:
        """Compute ``out[:] = x @ W.T``, without the bias; arguments as those of `into`."""
        ...

    def into(self, x: Tensor, out: Tensor) -> None:
        """Compute ``out[:] = x @ W.T + bias``.

        Args:
            x: ``[tokens, in_features]``, of the same memory order as ``out``.
            out: ``[tokens, out_features]``; neither overlaps ``x``.
        """
        ...

    def onto(self, x: Tensor, out: Tensor) -> None:
        """Compute ``out[:] += x @ W.T + bias``; arguments as those of `into`."""
        ...


MakeDense: TypeAlias = Callable[[Tensor, Tensor | None], Linear]
"""Makes a `Linear` of a weight ``[out_features, in_features]`` and a bias ``[out_features]``, both in the compute dtype."""

MakeFp8: TypeAlias = "Callable[[Fp8Weight, Tensor | None], Linear]"
"""Makes a `Linear` of a weight in e4m3 and a bias ``[out_features]`` in the compute dtype."""


@dataclass(frozen=True, slots=True)
class LinearForms:
    """A backend's `Linear` for each form in which files store a weight; the reader of the files picks one.

    Attributes:
        dense: For a weight that is stored whole, in any floating-point type.
        fp8: For a weight in e4m3; None where none is read.
    """

    dense: MakeDense
    fp8: MakeFp8 | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredLinear:
    """A linear layer as the files have it: tensors ``NAME.weight`` and, with a bias, ``NAME.bias``.

    Attributes:
        in_features: Width of its input, before any split over ranks; ``out_features`` likewise.
        split: How tensor-parallel ranks divide it; None if each rank has all of it.
        projection: What it is to adapters, whose sections say how its outputs are divided; None if it is none in a layer.
        is_vocabulary: Whether its outputs are tokens, which ranks divide as evenly as they can be.
    """

    name: str
    in_features: int
    out_features: int
    has_bias: bool = False
    split: Split | None = None
    projection: Projection | None = None
    is_vocabulary: bool = False

    @classmethod
    def of_projection(cls, name: str, projection: Projection, *, has_bias: bool) -> StoredLinear:
        """Return a layer's projection under its full name."""
        return cls(
            name=name,
            in_features=projection.in_features,
            out_features=projection.out_features,
            has_bias=has_bias,
            split=projection.split,
            projection=projection,
        )

    @property
    def weight(self) -> str:
        """Name of the weight."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        """Name of the bias."""
        return f"{self.name}.bias"

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Full shape of the weight."""
        return self.out_features, self.in_features
