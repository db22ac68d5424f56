"""peft with several adapters active at once, each times a weight: the truth of requests that name several."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from peft.tuners.lora.layer import LoraLayer
from support.oracle import Comparison, Oracle

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


class WeightedOracle(Oracle):
    """One base model with its adapters, all of them loaded."""

    def __init__(self, model_dir: Path, adapters: dict[str, Path]) -> None:
        super().__init__(model_dir, adapters)
        self._layers = [module for module in self._model.modules() if isinstance(module, LoraLayer)]

    def weighted_logits(self, token_ids: Sequence[int], weights: Mapping[str, float]) -> NDArray[np.float32]:
        """Return the logits after each token, ``[tokens, vocab]``, of adapters that are added up."""
        with self._active(weights):
            return super().logits(token_ids, None if not weights else next(iter(weights)))

    @contextmanager
    def _active(self, weights: Mapping[str, float]) -> Iterator[None]:
        choose, model = self._model.set_adapter, self._model
        for layer in self._layers:
            for name, weight in weights.items():
                layer.set_scale(name, weight)
        model.set_adapter = lambda _: model.base_model.set_adapter([*weights])
        try:
            yield
        finally:
            model.set_adapter = choose
            for layer in self._layers:
                for name in weights:
                    layer.set_scale(name, 1.0)

    def compare(
        self, comparison: Comparison, prompt: Sequence[int], tokens: Sequence[int], weights: Mapping[str, float]
    ) -> None:
        """Compare each token of an output with the choice at its position, the output so far being given."""
        logits = self.weighted_logits([*prompt, *tokens[:-1]], weights)[len(prompt) - 1 :]
        for position, (row, token) in enumerate(zip(logits, tokens, strict=True)):
            comparison.choice(f"{dict(weights)} at {position}", row, token)
