"""Ways through a layer's projections with every part that an adapter may have (ADR 26).

    y = c * (W (e * x) + sum of s B A x) + S x + b

Pairs come first, as they read x and not e * x: their delta lies in y, x is scaled where it lies, and the product accumulates
onto y. FLoRA replaces what then lies there, in its rows and projections, which have no pairs. Then one pointwise kernel applies c and b, and S x is added by a kernel of its own. o and down write a scratch
instead of the residual stream where c has to multiply them before they get there.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch

from loraplex_engine.runners.cuda.lora_paths import BasePath

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_kernels.lora.decode import LoraDecode
    from loraplex_kernels.lora.finish_norm import FinishNorm
    from loraplex_kernels.lora.flora import LoraFlora, Product
    from loraplex_kernels.lora.sparse import LoraSparse
    from loraplex_kernels.lora.vectors import LoraVectors, RowAdapters
    from loraplex_kernels.pointwise.rms_norm import RmsNorm
    from torch import Tensor

    from loraplex_engine.model.linear import Linear
    from loraplex_engine.runners.cuda.followers import Followers
    from loraplex_engine.runners.cuda.lora_grids import Grids
    from loraplex_engine.runners.cuda.lora_paths import TokenLora
    from loraplex_engine.runners.cuda.part_variants import PartVariant
    from loraplex_engine.runners.cuda.step_input import StepInputs


class PartPass(NamedTuple):
    """What is added for one further place in the lists of rows with several adapters.

    Attributes:
        scales: fp32 ``[tokens]``; the requests' factors.
        adds_bias: Whether any of the adapters has b.
        has_sparse: Whether any has S.
    """

    scales: Tensor
    adds_bias: bool
    has_sparse: bool


class PartKernels:
    """The kernels of all parts but pairs, with the rows of one step.

    Args:
        vectors: Kernels of e, c and b.
        sparse: Kernel of S, with the step's items.
        rows: The rows' adapters.
        flora: Kernels of FLoRA, with the step's rows; None where only steps without it come.
        more_rows: The further adapters of rows that have several, by pass.
        finish_norm: c and b of o and down, together with the norm behind them; None where something else stands there.
    """

    def __init__(
        self,
        vectors: LoraVectors,
        sparse: LoraSparse,
        rows: RowAdapters,
        flora: LoraFlora | None = None,
        more_rows: tuple[RowAdapters, ...] = (),
        finish_norm: FinishNorm | None = None,
    ) -> None:
        self.vectors, self.sparse, self.rows, self.flora, self.more_rows = vectors, sparse, rows, flora, more_rows
        self.finish_norm = finish_norm

    @property
    def fixed_tensors(self) -> tuple[Tensor, ...]:
        """Tensors whose addresses reach kernels through tables."""
        own = (self.sparse.buffer, self.rows.buffer, *(rows.buffer for rows in self.more_rows))
        return own if self.flora is None else (*own, self.flora.buffer)


class _PartPath(BasePath):
    """What the paths of decode steps and of steps with prompts share: the order of an op's parts."""

    def __init__(self, followers: Followers, parts: PartKernels) -> None:
        super().__init__(followers)
        self._parts = parts

    def reads_input(self, op: str) -> bool:
        """See `LayerPath`."""
        del op
        return True

    @abstractmethod
    def _needs(self, layer: int, op: str) -> PartVariant:
        """Return what may be computed in an op."""

    @abstractmethod
    def _start(self, layer: int, op: str, x: Tensor, out: Tensor, step: StepInputs) -> None:
        """Write the pairs' delta to ``out``, before x is scaled."""

    def project(self, layer: int, op: str, linear: Linear, x: Tensor, out: Tensor, step: StepInputs) -> None:
        """See `LayerPath`."""
        self._multiply(layer, op, linear, x, out, step)
        self._finish(layer, op, linear, x, out, step)

    def _multiply(self, layer: int, op: str, linear: Linear, x: Tensor, out: Tensor, step: StepInputs) -> None:
        needs = self._needs(layer, op)
        if needs.has_pairs:
            self._start(layer, op, x, out, step)
        if needs.scales_inputs:
            self._parts.vectors.scale_input(layer, op, x, self._parts.rows)
            if self._inputs is not None:
                self._inputs.forget(x)
        if needs.has_pairs:
            linear.onto(x, out)
        else:
            linear.into(x, out)
        if needs.has_flora:
            assert self._parts.flora is not None
            self._parts.flora.replace(layer, op, _product_of(linear), linear.bias, x, out)

    def add_to_residual(
        self, layer: int, op: str, linear: Linear, x: Tensor, residual: Tensor, scratch: Tensor, step: StepInputs
    ) -> Tensor | None:
        """See `LayerPath`."""
        needs = self._needs(layer, op)
        if needs.has_pairs or needs.scales_inputs or needs.finishes or needs.has_flora:
            self.project(layer, op, linear, x, scratch, step)
            return scratch
        self._finish(
            layer, op, linear, x, residual, step
        )  # S x alone: behind a kernel of ours, whose end hides its start
        return super().add_to_residual(layer, op, linear, x, residual, scratch, step)

    def _finish(self, layer: int, op: str, linear: Linear, x: Tensor, y: Tensor, step: StepInputs) -> None:
        needs, parts = self._needs(layer, op), self._parts
        if needs.finishes:
            parts.vectors.finish(layer, op, y, parts.rows, step.scales, linear.bias)
        if needs.has_sparse:
            parts.sparse.add(layer, op, x, y, step.scales)


def _product_of(linear: Linear) -> Product:
    """Return what multiplies with some outputs of a linear layer."""

    def multiply(first: int, last: int, x: Tensor, out: Tensor) -> None:
        torch.mm(x, linear.rows(first, last).t(), out=out)

    return multiply


class DecodePartPath(_PartPath):
    """A decode step, in line as `InLineLoraPath`: a graph's kernels are those of its variant, in every op.

    c and b of o and down are left to the next layer's norm, if there is one at once and nothing is added behind them.

    Args:
        followers: They find qkv and gate_up complete.
        lora: The pairs' kernels, with the step's items; every op's delta is complete.
        hidden: Scratch from ``lora.new_scratch``.
        grids: CTAs of the pairs' kernels.
        parts: The other kernels.
        variant: What is computed.
    """

    def __init__(
        self,
        followers: Followers,
        lora: LoraDecode,
        hidden: Tensor,
        grids: Grids,
        *,
        parts: PartKernels,
        variant: PartVariant,
    ) -> None:
        super().__init__(followers, parts)
        self._lora, self._hidden, self._grids, self._variant = lora, hidden, grids, variant
        self._unfinished: tuple[int, str, Tensor | None] | None = None

    def _needs(self, layer: int, op: str) -> PartVariant:
        return self._variant

    def add_to_residual(
        self, layer: int, op: str, linear: Linear, x: Tensor, residual: Tensor, scratch: Tensor, step: StepInputs
    ) -> Tensor | None:
        """See `LayerPath`."""
        needs, finish_norm = self._variant, self._parts.finish_norm
        follows = finish_norm is not None and (op == "o" or layer + 1 < finish_norm.num_layers)
        if not follows or not needs.finishes or needs.has_sparse:
            return super().add_to_residual(layer, op, linear, x, residual, scratch, step)
        self._multiply(layer, op, linear, x, scratch, step)
        self._unfinished = layer, op, linear.bias
        return scratch

    def norm(
        self, norm: RmsNorm, rest: Tensor | None, weight: Tensor, hidden: Tensor, out: Tensor, step: StepInputs
    ) -> None:
        """See `LayerPath`."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is None:
            super().norm(norm, rest, weight, hidden, out, step)
            return
        (layer, op, bias), finish_norm = unfinished, self._parts.finish_norm
        assert rest is not None
        assert finish_norm is not None
        rows = self._parts.rows
        finish_norm.launch(layer, op, rest, rows, step.scales, bias, residual=hidden, weight=weight, out=out)

    def _start(self, layer: int, op: str, x: Tensor, out: Tensor, step: StepInputs) -> None:
        self._lora.shrink(layer, op, x, self._hidden, self._grids.shrink)
        self._lora.expand_delta(layer, op, self._hidden, step.scales, out, self._grids.expand)


class TokenPartPath(_PartPath):
    """A step with prefill chunks: an op's kernels are those that the step's adapters need.

    Args:
        followers: They find qkv and gate_up complete.
        lora: The pairs of any tokens.
        parts: The other kernels.
        needs: What each op of each layer needs; `prepare` of the kernels goes with it.
        more: The passes of rows with several adapters: b and S of these add up.
    """

    def __init__(
        self,
        followers: Followers,
        lora: TokenLora,
        parts: PartKernels,
        needs: list[dict[str, PartVariant]],
        more: Sequence[PartPass] = (),
    ) -> None:
        super().__init__(followers, parts)
        self._lora, self._op_needs, self._more = lora, needs, more

    def _needs(self, layer: int, op: str) -> PartVariant:
        return self._op_needs[layer][op]

    def _start(self, layer: int, op: str, x: Tensor, out: Tensor, step: StepInputs) -> None:
        out.zero_()
        self._lora.apply(layer, op, x, out, step.scales)

    def _finish(self, layer: int, op: str, linear: Linear, x: Tensor, y: Tensor, step: StepInputs) -> None:
        super()._finish(layer, op, linear, x, y, step)
        for number, (scales, adds_bias, has_sparse) in enumerate(self._more):
            if adds_bias:
                self._parts.vectors.finish(layer, op, y, self._parts.more_rows[number], scales)
            if has_sparse:
                self._parts.sparse.add(layer, op, x, y, scales, number=number + 1)
