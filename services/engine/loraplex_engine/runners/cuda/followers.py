"""The kernels that follow the products of qkv and gate_up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from loraplex_kernels.pointwise.silu_mul import SiluMul

from loraplex_engine.runners.cuda.fp8_inputs import Fp8Inputs

if TYPE_CHECKING:
    from torch import Tensor

    from loraplex_engine.model.layers import RmsNorm
    from loraplex_engine.model.linear import Linear


class HasQkNorm(Protocol):
    """A layer's weights, as far as the follower of qkv needs them."""

    @property
    def q_norm(self) -> RmsNorm | None:
        """The norm of each query head, if the layer has one."""
        ...

    @property
    def k_norm(self) -> RmsNorm | None:
        """The norm of each key head, if the layer has one."""
        ...


class FinishesQkv(Protocol):
    """What finishes qkv in every layer: `RopeKv`, or several of them."""

    def launch(
        self,
        layer: int,
        qkv: Tensor,
        positions: Tensor,
        kv_slots: Tensor,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        delta: Tensor | None = None,
    ) -> None:
        """See `RopeKv.launch`."""
        ...


class ComputesGate(Protocol):
    """gate_up's products with the gate in them: `GateProducts`, or `DenseGateProducts`."""

    def launch(self, layer: int, linear: Linear, x: Tensor, gate_up: Tensor, out: Tensor) -> bool:
        """See `GateProducts.launch`."""
        ...


class NormShape(NamedTuple):
    """An RMS norm of the residual stream."""

    hidden_size: int
    eps: float


@dataclass(frozen=True, slots=True)
class Followers:
    """The pointwise kernels behind products: ``rope`` finishes qkv, ``silu_mul`` gate_up; both can add a delta.

    Attributes:
        inputs: Where inputs of FP8 products lie in e4m3; None if no product is. FP8 products do not accumulate: followers add
            LoRA's delta to qkv and gate_up, and the next norm adds o and down to the residual stream (ADR 35).
        norm: What follows o and down at once, `LayerPath.norm`; None if something else stands behind them.
        gate_products: gate_up's products with the gate in them, for ops without LoRA.
    """

    rope: FinishesQkv
    silu_mul: SiluMul
    inputs: Fp8Inputs | None = None
    norm: NormShape | None = None
    gate_products: ComputesGate | None = None

    @property
    def can_accumulate(self) -> bool:
        """Whether products accumulate onto their output for nothing (ADR 18)."""
        return self.inputs is None


def norm_weights(weights: HasQkNorm) -> tuple[Tensor | None, Tensor | None]:
    """Return the weights of qk-norm, if the layer has it."""
    if weights.q_norm is None or weights.k_norm is None:
        return None, None
    return weights.q_norm.weight, weights.k_norm.weight
