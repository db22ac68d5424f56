"""How long the steps in flight should take; the watchdog tells a long step from a hanging one by it.

It uses measured costs (`step_costs`) if there are any, on the safe side: every token counts as a prompt's token, and
costs more the longer its sequence is. Before any measurement it uses the time that a slow device needs for the model's
products.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from loraplex_common.adapter_image import Geometry
    from numpy.typing import NDArray

    from loraplex_engine.scheduler.step_costs import StepCosts
    from loraplex_engine.step import StepPlan

SLOW_FLOPS: Final = {"cuda": 10e12}
"""Operations per second, by backend, that every step reaches, even the first."""
SLOWEST_FLOPS: Final = 10e9
"""Operations per second of every other backend: one busy core."""


class StepTimes:
    """Estimates how long the steps in flight take.

    Args:
        costs: Measured costs of steps.
        geometry: The model's shape, which tells how much there is to compute for a token.
        backend: Name of the compute backend.
    """

    def __init__(self, costs: StepCosts, geometry: Geometry, *, backend: str) -> None:
        self._costs = costs
        self._hidden_size = geometry.distinct_layers[0][0].in_features  # the first projection reads the residual stream
        self._slow_token_s = 2 * _num_weights(geometry) / SLOW_FLOPS.get(backend, SLOWEST_FLOPS)
        self._in_flight: deque[float] = deque()
        self.expected_s = 0.0

    def launched(self, plan: StepPlan) -> None:
        """Note that a step was handed to the runner."""
        self._in_flight.append(self.of(plan.starts, plan.num_tokens))
        self.expected_s = sum(self._in_flight)

    def completed(self) -> None:
        """Note that the oldest step in flight is done."""
        self._in_flight.popleft()
        self.expected_s = sum(self._in_flight)

    def of(self, starts: NDArray[np.int32], num_tokens: NDArray[np.int32]) -> float:
        """Return the seconds that a step should take; arguments as in `StepPlan`."""
        costs = self._costs
        token_s = costs.prefill_s_per_token if costs.is_measured else self._slow_token_s
        # Attention's share of a token's cost grows with the tokens before it.
        contexts = 1.0 + (starts + num_tokens) / (2 * self._hidden_size)
        return costs.decode_step_s + token_s * float((num_tokens * contexts).sum())


def _num_weights(geometry: Geometry) -> int:
    """Return the weights of the decoder's layers."""
    return sum(each.in_features * each.out_features for layer in geometry.decoder_layers for each in layer)
