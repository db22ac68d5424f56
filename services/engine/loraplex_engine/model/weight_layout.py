"""Which part of each weight a tensor-parallel rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from loraplex_common.base_model import BaseModelError
from loraplex_common.projections import Split

if TYPE_CHECKING:
    from loraplex_engine.model.linear import StoredLinear

Index: TypeAlias = tuple[slice, ...]
"""Index of a part of a tensor, one slice for each dimension."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightLayout:
    """Which part of each weight a tensor-parallel rank holds."""

    tp_degree: int = 1
    tp_rank: int = 0

    def local(self, name: str, shape: tuple[int, ...], split: Split | None = None) -> Index:
        """Return the index of this rank's part of a tensor.

        Args:
            name: For messages.
            shape: Full shape: a weight ``[outputs, inputs]`` or a bias ``[outputs]``.
            split: How the ranks divide the linear layer; a bias of one that is split along its inputs is not divided.

        Raises:
            BaseModelError: If the dimension cannot be divided evenly.
        """
        axis = {Split.OUTPUTS: 0, Split.INPUTS: 1, None: len(shape)}[split]
        if axis >= len(shape) or self.tp_degree == 1:
            return (slice(None),) * len(shape)
        if shape[axis] % self.tp_degree:
            raise BaseModelError(f"{name}: {shape[axis]} cannot be divided over {self.tp_degree} ranks")
        size = shape[axis] // self.tp_degree
        part = slice(self.tp_rank * size, (self.tp_rank + 1) * size)
        return tuple(part if dimension == axis else slice(None) for dimension in range(len(shape)))

    def weight(self, part: StoredLinear) -> tuple[Index, ...]:
        """Return this rank's parts of a weight ``[outputs, inputs]``, in the order of its outputs.

        Raises:
            BaseModelError: If the dimension cannot be divided evenly.
        """
        if (outputs := self._outputs(part)) is not None:
            return tuple((each, slice(None)) for each in outputs)
        return (self.local(part.weight, part.weight_shape, part.split),)

    def bias(self, part: StoredLinear) -> tuple[Index, ...]:
        """Return this rank's parts of a bias ``[outputs]``; none on ranks that add no bias to their partial sum."""
        if part.split is Split.INPUTS and self.tp_rank:
            return ()
        if (outputs := self._outputs(part)) is not None:
            return tuple((each,) for each in outputs)
        return (self.local(part.bias, (part.out_features,), part.split),)

    def _outputs(self, part: StoredLinear) -> tuple[slice, ...] | None:
        """Return the outputs that this rank computes of a layer with sections or uneven parts; None of any other."""
        if self.tp_degree == 1:
            return None
        if part.is_vocabulary:
            size, rank, degree = part.out_features, self.tp_rank, self.tp_degree
            return (slice(size * rank // degree, size * (rank + 1) // degree),)
        if part.projection is None or not part.projection.sections:
            return None
        if not all(section.can_be_split(self.tp_degree) for section in part.projection.sections):
            raise BaseModelError(f"{part.name}: its outputs cannot be divided over {self.tp_degree} ranks")
        return part.projection.local_outputs(self.tp_rank, self.tp_degree)
