"""A way through a layer's projections whose ranks add up what o and down compute before anything reads it (ADR 58)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraplex_kernels.pointwise.rms_norm import RmsNorm
    from torch import Tensor

    from loraplex_engine.model.linear import Linear
    from loraplex_engine.rank_group import RankGroup
    from loraplex_engine.runners.cuda.followers import HasQkNorm
    from loraplex_engine.runners.cuda.lora_paths import LayerPath
    from loraplex_engine.runners.cuda.step_input import StepInputs


class RankPath:
    """See `LayerPath`: another path on one rank, whose o and down have all of their parts when the ranks add them up.

    The residual stream is the same on all ranks, so no partial sum may accumulate onto it, as products do without a group.

    Args:
        inner: Computes this rank's part.
        group: The ranks.
    """

    def __init__(self, inner: LayerPath, group: RankGroup) -> None:
        self._inner, self._group = inner, group

    def reads_input(self, op: str) -> bool:
        """See `LayerPath`."""
        return self._inner.reads_input(op)

    def project(self, layer: int, op: str, linear: Linear, x: Tensor, out: Tensor, step: StepInputs) -> None:
        """See `LayerPath`."""
        self._inner.project(layer, op, linear, x, out, step)

    def add_to_residual(
        self, layer: int, op: str, linear: Linear, x: Tensor, residual: Tensor, scratch: Tensor, step: StepInputs
    ) -> Tensor:
        """See `LayerPath`."""
        del residual
        self.project_branch(layer, op, linear, x, scratch, step)
        return scratch

    def norm(
        self, norm: RmsNorm, rest: Tensor | None, weight: Tensor, hidden: Tensor, out: Tensor, step: StepInputs
    ) -> None:
        """See `LayerPath`."""
        self._inner.norm(norm, rest, weight, hidden, out, step)

    def project_branch(self, layer: int, op: str, linear: Linear, x: Tensor, out: Tensor, step: StepInputs) -> None:
        """See `LayerPath`."""
        self._inner.project_branch(layer, op, linear, x, out, step)
        self._group.all_reduce(out)

    def finish_qkv(self, layer: int, weights: HasQkNorm, qkv: Tensor, step: StepInputs) -> None:
        """See `LayerPath`."""
        self._inner.finish_qkv(layer, weights, qkv, step)

    def finish_gate_up(self, layer: int, gate_up: Tensor, out: Tensor, step: StepInputs) -> None:
        """See `LayerPath`."""
        self._inner.finish_gate_up(layer, gate_up, out, step)
