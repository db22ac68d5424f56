"""One copy of random weights for all engines of a process."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_engine.model.linear import Linear, LinearForms, StoredLinear
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
        self._linears: dict[object, Linear] = {}
        self._forms: LinearForms | None = None

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a weight."""
        key = (name, shape)
        if key not in self._kept:
            self._kept[key] = self._source.read(name, shape)
        return self._kept[key]

    def linear(self, parts: Sequence[StoredLinear], forms: LinearForms) -> Linear:
        """Return linear layers stacked along their outputs.

        Layers in FP8 are in forms of their engine: those of the engine before are let go, or each would keep its own.
        """
        if forms != self._forms:
            self._linears.clear()
            self._forms = forms
        key = tuple(parts)
        if key not in self._linears:
            self._linears[key] = self._source.linear(parts, forms)
        return self._linears[key]

    def has(self, name: str) -> bool:
        """Tell whether the source has a weight."""
        return self._source.has(name)

    def close(self) -> None:
        """Keep everything: another model may follow."""
