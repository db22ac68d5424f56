"""One copy of random weights for all engines of a process."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loraplex_engine.model.weights import WeightSource
    from torch import Tensor


class SharedWeights:
    """A `WeightSource` that gives every model the same tensors; engines only read them.

    Args:
        source: Asked once for each weight.
    """

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._kept: dict[object, Tensor] = {}

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a weight."""
        key = (name, shape)
        if key not in self._kept:
            self._kept[key] = self._source.read(name, shape)
        return self._kept[key]

    def read_stacked(self, parts: Iterable[tuple[str, tuple[int, ...]]]) -> Tensor:
        """Return weights stacked along their outputs."""
        key = tuple(parts)
        if key not in self._kept:
            self._kept[key] = self._source.read_stacked(key)
        return self._kept[key]

    def has(self, name: str) -> bool:
        """Tell whether the source has a weight."""
        return self._source.has(name)

    def close(self) -> None:
        """Keep everything: another model may follow."""
