"""Ways through a layer's projections: without adapters, and with LoRA of decode rows or of any tokens.

A path computes the four products of a layer and the pointwise step that must follow qkv's and gate_up's. The decoder
calls the same methods in the same order whichever path a step takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from loraplex_engine.runners.cuda.followers import norm_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_kernels.lora.decode import LoraDecode
    from loraplex_kernels.pointwise.rms_norm import RmsNorm
    from torch import Tensor

    from loraplex_engine.model.linear import Linear
    from loraplex_engine.runners.cuda.followers import Followers, HasQkNorm
    from loraplex_engine.runners.cuda.fork import Fork
    from loraplex_engine.runners.cuda.lora_grids import Grids
    from loraplex_engine.runners.cuda.step_input import StepInputs


class LayerPath(Protocol):
    """How a step goes through projections and their followers."""

    def reads_input(self, op: str) -> bool:
        """Tell whether any kernel but the base's product reads an op's input, in any layer."""
        ...

    def project(self, layer: int, op: str, linear: Linear, x: Tensor, out: Tensor, step: StepInputs) -> None:
        """Compute qkv's or gate_up's product; whether LoRA is in ``out`` yet is the path's affair."""
        ...

    def add_to_residual(
        self, layer: int, op: str, linear: Linear, x: Tensor, residual: Tensor, scratch: Tensor, step: StepInputs
    ) -> Tensor | None:
        """Add o's or down's product to the residual stream, but for what is returned: that the next norm adds.

        Args:
            layer: Decoder layer.
            op: ``o`` or ``down``.
            linear: The projection.
            x: ``[tokens, in_features]``.
            residual: ``[tokens, hidden]``.
            scratch: ``[tokens, hidden]``, and what is returned, if anything is.
            step: The step's inputs.
        """
        ...

    def norm(
        self, norm: RmsNorm, rest: Tensor | None, weight: Tensor, hidden: Tensor, out: Tensor, step: StepInputs
    ) -> None:
        """Add what `add_to_residual` returned to the residual stream, and norm it.

        Args:
            norm: The kernel.
            rest: ``[tokens, hidden]``; None if nothing was returned.
            weight: ``[hidden]``.
            hidden: ``[tokens, hidden]``; the residual stream.
            out: ``[tokens, hidden]``.
            step: The step's inputs.
        """
        ...

    def project_branch(self, layer: int, op: str, linear: Linear, x: Tensor, out: Tensor, step: StepInputs) -> None:
        """Compute o's or down's product with LoRA in ``out``, for decoders that change it before it joins the residual stream."""
        ...

    def finish_qkv(self, layer: int, weights: HasQkNorm, qkv: Tensor, step: StepInputs) -> None:
        """Rotate q and k in place, write K and V to their pages."""
        ...

    def finish_gate_up(self, layer: int, gate_up: Tensor, out: Tensor, step: StepInputs) -> None:
        """Compute ``out = silu(gate) * up``, or GELU in the place of SiLU."""
        ...


class BasePath:
    """No row has an adapter."""

    def __init__(self, followers: Followers) -> None:
        self._rope, self._silu_mul, self._inputs = followers.rope, followers.silu_mul, followers.inputs

    def reads_input(self, op: str) -> bool:
        """See `LayerPath`."""
        del op
        return False

    def project(self, layer: int, op: str, linear: Linear, x: Tensor, out: Tensor, step: StepInputs) -> None:
        """See `LayerPath`."""
        del layer, op, step
        linear.into(x, out)

    def add_to_residual(
        self, layer: int, op: str, linear: Linear, x: Tensor, residual: Tensor, scratch: Tensor, step: StepInputs
    ) -> Tensor | None:
        """See `LayerPath`."""
        del layer, op, step
        if self._inputs is not None:
            linear.into(x, scratch)
            return scratch
        linear.onto(x, residual)
        return None

    def norm(
        self, norm: RmsNorm, rest: Tensor | None, weight: Tensor, hidden: Tensor, out: Tensor, step: StepInputs
    ) -> None:
        """See `LayerPath`."""
        del step
        norm.launch(rest, weight, out, residual=hidden)

    def project_branch(self, layer: int, op: str, linear: Linear, x: Tensor, out: Tensor, step: StepInputs) -> None:
        """See `LayerPath`."""
        self.project(layer, op, linear, x, out, step)

    def finish_qkv(self, layer: int, weights: HasQkNorm, qkv: Tensor, step: StepInputs) -> None:
        """See `LayerPath`."""
        q_norm, k_norm = norm_weights(weights)
        self._rope.launch(layer, qkv, step.positions, step.kv_slots, q_norm=q_norm, k_norm=k_norm)

    def finish_gate_up(self, layer: int, gate_up: Tensor, out: Tensor, step: StepInputs) -> None:
        """See `LayerPath`."""
        del layer, step
        self._silu_mul.launch(gate_up, out)


class _DecodeLoraPath(BasePath):
    """What the two LoRA paths of decode steps share.

    Padding rows are in no item, so nothing is computed for them; they keep whatever was there, or accumulate onto it.

    Args:
        followers: For layers whose qkv or gate_up has no LoRA in this path.
        lora: The kernels, with the step's items.
        hidden: Scratch from ``lora.new_scratch``; an op's is used up before the next op's shrink begins.
        grids: CTAs.
        ops: Ops that any row's adapter may adapt; the others go as on `BasePath`.
    """

    def __init__(
        self, followers: Followers, lora: LoraDecode, hidden: Tensor, grids: Grids, *, ops: frozenset[str]
    ) -> None:
        super().__init__(followers)
        self._lora, self._hidden, self._grids, self._ops = lora, hidden, grids, ops

    def reads_input(self, op: str) -> bool:
        """See `LayerPath`."""
        return op in self._ops

    def project_branch(self, layer: int, op: str, linear: Linear, x: Tensor, out: Tensor, step: StepInputs) -> None:
        """See `LayerPath`; the product comes after shrink, so that expand finds it."""
        if op not in self._ops:
            linear.into(x, out)
            return
        self._beside(
            lambda: self._lora.shrink(layer, op, x, self._hidden, self._grids.shrink), lambda: linear.into(x, out)
        )
        self._lora.expand_add(layer, op, self._hidden, step.scales, out, self._grids.expand)

    def _beside(self, lora_work: Callable[[], None], main_work: Callable[[], None]) -> None:
        lora_work()
        main_work()

    def _write_delta(self, layer: int, op: str, x: Tensor, delta: Tensor, step: StepInputs) -> None:
        self._lora.shrink(layer, op, x, self._hidden, self._grids.shrink)
        self._lora.expand_delta(layer, op, self._hidden, step.scales, delta, self._grids.expand)

    def _add_delta(self, layer: int, op: str, x: Tensor, y: Tensor, step: StepInputs) -> None:
        self._lora.shrink(layer, op, x, self._hidden, self._grids.shrink)
        self._lora.expand_add(layer, op, self._hidden, step.scales, y, self._grids.expand)


class BesideLoraPath(_DecodeLoraPath):
    """Few rows: all of LoRA runs beside the products, so that none of it stands between a product and its follower.

    The followers of qkv and gate_up add a delta that is there by then; o's and down's goes to the residual stream, and
    the next norm adds their products. So no product has to accumulate, and FP8 products of many rows go this way, too, with a fork
    that runs all in order.

    Args:
        delta: Scratch, fp32, for the widest of qkv and gate_up; used up by an op's follower.
        fork: Side stream.
    """

    def __init__(
        self,
        followers: Followers,
        lora: LoraDecode,
        hidden: Tensor,
        grids: Grids,
        *,
        ops: frozenset[str],
        delta: Tensor,
        fork: Fork,
    ) -> None:
        super().__init__(followers, lora, hidden, grids, ops=ops)
        self._delta, self._fork = delta, fork

    def project(self, layer: int, op: str, linear: Linear, x: Tensor, out: Tensor, step: StepInputs) -> None:
        """See `LayerPath`."""
        if op not in self._ops:
            linear.into(x, out)
            return
        self._fork.beside(
            lambda: self._write_delta(layer, op, x, self._delta_of(out), step), lambda: linear.into(x, out)
        )

    def add_to_residual(
        self, layer: int, op: str, linear: Linear, x: Tensor, residual: Tensor, scratch: Tensor, step: StepInputs
    ) -> Tensor | None:
        """See `LayerPath`."""
        if op not in self._ops:
            return super().add_to_residual(layer, op, linear, x, residual, scratch, step)
        self._fork.beside(lambda: self._add_delta(layer, op, x, residual, step), lambda: linear.into(x, scratch))
        return scratch

    def _beside(self, lora_work: Callable[[], None], main_work: Callable[[], None]) -> None:
        self._fork.beside(lora_work, main_work)

    def _delta_of(self, out: Tensor) -> Tensor:
        return self._delta[: out.numel()].view(out.shape)

    def finish_qkv(self, layer: int, weights: HasQkNorm, qkv: Tensor, step: StepInputs) -> None:
        """See `LayerPath`."""
        q_norm, k_norm = norm_weights(weights)
        delta = self._delta_of(qkv) if "qkv" in self._ops else None
        self._rope.launch(layer, qkv, step.positions, step.kv_slots, q_norm=q_norm, k_norm=k_norm, delta=delta)

    def finish_gate_up(self, layer: int, gate_up: Tensor, out: Tensor, step: StepInputs) -> None:
        """See `LayerPath`."""
        del layer, step
        self._silu_mul.launch(gate_up, out, delta=self._delta_of(gate_up) if "gate_up" in self._ops else None)


class InLineLoraPath(_DecodeLoraPath):
    """Many rows: one kernel after the other, an op's LoRA before its product, which accumulates onto it.

    Accumulating costs cuBLAS nothing at decode. The order spares qkv's and gate_up's expand a read of its output, and every
    LoRA kernel follows one of ours, whose end dependent launch lets it overlap; behind a product it could not.
    """

    def project(self, layer: int, op: str, linear: Linear, x: Tensor, out: Tensor, step: StepInputs) -> None:
        """See `LayerPath`."""
        if op not in self._ops:
            linear.into(x, out)
            return
        self._write_delta(layer, op, x, out, step)
        linear.onto(x, out)

    def add_to_residual(
        self, layer: int, op: str, linear: Linear, x: Tensor, residual: Tensor, scratch: Tensor, step: StepInputs
    ) -> Tensor | None:
        """See `LayerPath`."""
        if op in self._ops:
            self._add_delta(layer, op, x, residual, step)
        return super().add_to_residual(layer, op, linear, x, residual, scratch, step)


class TokenLora(Protocol):
    """LoRA of any tokens, decode rows and chunks alike, prepared for one step."""

    def apply(self, layer: int, op: str, x: Tensor, y: Tensor, scales: Tensor) -> None:
        """Compute ``y += scale * scaling * x A^T B^T``."""
        ...


class AddedLoraPath(BasePath):
    """Steps with prefill chunks: LoRA is added to each product before its follower."""

    def __init__(self, followers: Followers, lora: TokenLora) -> None:
        super().__init__(followers)
        self._lora = lora

    def reads_input(self, op: str) -> bool:
        """See `LayerPath`; which ops a step's adapters leave alone is the kernels' affair."""
        del op
        return True

    def project(self, layer: int, op: str, linear: Linear, x: Tensor, out: Tensor, step: StepInputs) -> None:
        """See `LayerPath`."""
        linear.into(x, out)
        self._lora.apply(layer, op, x, out, step.scales)

    def add_to_residual(
        self, layer: int, op: str, linear: Linear, x: Tensor, residual: Tensor, scratch: Tensor, step: StepInputs
    ) -> Tensor | None:
        """See `LayerPath`."""
        rest = super().add_to_residual(layer, op, linear, x, residual, scratch, step)
        self._lora.apply(layer, op, x, residual, step.scales)
        return rest
