"""Adapted projections of a checkpoint as the parts that they compute with (ADR 26), each with its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from loraplex_common.adapter_parts import ModuleSpec
from loraplex_common.low_rank import LOW_RANK, LowRank
from loraplex_common.part_kind import Part

from loraplex_adapter_store.checkpoint.safetensors_file import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class ScaledRows:
    """The first rows and columns of a matrix that modules share, each row times the module's own factor for it.

    Its values are computed each time they are asked for: VeRA's modules share two matrices, and together their products
    are as large as all of their modules' pairs.

    Attributes:
        matrix: At least ``[rows, columns]``.
        factor: ``[rows]``.
        shape: ``(rows, columns)``.
    """

    matrix: Tensor
    factor: Tensor
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        """What it is made of, for messages."""
        return f"{self.matrix.name} times {self.factor.name}"

    def values(self) -> NDArray[Any]:
        """Return the values, fp32."""
        rows, columns = self.shape
        with np.errstate(over="ignore", invalid="ignore"):
            scaled: NDArray[Any] = self.matrix.values()[:rows, :columns] * self.factor.values()[:, None]
        return scaled

    def largest(self) -> float:
        """Return the largest magnitude; NaN or infinity if there is one."""
        return self._largest

    @cached_property
    def _largest(self) -> float:
        return float(np.max(np.abs(self.values()))) if self.shape[0] else 0.0


PartTensor: TypeAlias = Tensor | ScaledRows


@dataclass(frozen=True, slots=True)
class PartTensors:
    """One part of a module.

    Attributes:
        tensors: In the order of `PartKind.shapes`.
    """

    part: Part
    tensors: tuple[PartTensor, ...]

    @property
    def kind(self) -> str:
        """Name of its kind."""
        return self.part.kind


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted projection.

    Attributes:
        name: Its dotted name in the base model.
        parts: At most one of each kind, at least one.
    """

    layer: int
    projection: str
    name: str
    parts: tuple[PartTensors, ...]

    @property
    def spec(self) -> ModuleSpec:
        """What engines know of it before they have its pages."""
        return ModuleSpec(self.layer, self.projection, tuple(each.part for each in self.parts))

    @property
    def rank(self) -> int:
        """Rank of its low-rank pair; 0 without one."""
        return self.spec.rank

    @property
    def scaling(self) -> float:
        """Scaling of its low-rank pair; 0 without one."""
        return self.spec.scaling

    @property
    def is_plain(self) -> bool:
        """Whether it is plain LoRA: a pair of matrices as a file holds them, and nothing else."""
        (first, *others) = self.parts
        return first.kind == LOW_RANK and not others and all(isinstance(each, Tensor) for each in first.tensors)

    def of_kind(self, kind: str) -> PartTensors | None:
        """Return its part of a kind, if it has one."""
        return next((each for each in self.parts if each.kind == kind), None)


def low_rank(rank: int, scaling: float, a: PartTensor, b: PartTensor) -> PartTensors:
    """Return a pair: A ``[rank, in_features]``, B ``[out_features, rank]``."""
    return PartTensors(LowRank(rank, scaling), (a, b))
