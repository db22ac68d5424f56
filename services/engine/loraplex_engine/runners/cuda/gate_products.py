"""gate_up's FP8 products of few rows with the gate in them: what the gate reads is never written (ADR 46)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from loraplex_kernels.pointwise.fp8 import QuantiseFp8

from loraplex_engine.runners.cuda.fp8_linear import ScaledMmLinear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from loraplex_engine.model.linear import Linear
    from loraplex_engine.runners.cuda.fp8_few_rows import FewRowProduct
    from loraplex_engine.runners.cuda.fp8_inputs import Fp8Inputs


class GateProducts:
    """gate_up's product and its gate as one kernel, and one behind it that quantises down's input; bit by bit as apart.

    Args:
        inputs: Where inputs of FP8 products lie in e4m3.
        linears: gate_up of each layer.
        gate: The gate's macros, `SiluMul.macros`.
    """

    def __init__(self, inputs: Fp8Inputs, linears: Sequence[Linear], gate: tuple[str, ...]) -> None:
        self._inputs = inputs
        self._products = [self._product(each, gate) for each in linears]
        self._maxima: Tensor | None = None
        made = next((each for each in self._products if each is not None), None)
        if made is None:
            return
        width = linears[0].out_features // 2
        parts = 0 if inputs.has_groups else -(-width // made.columns)
        if parts:
            self._maxima = torch.zeros(made.max_rows, parts, device=inputs.library.device)
        self._quantise = QuantiseFp8(inputs.library, width, has_groups=inputs.has_groups, maxima=parts)

    def _product(self, linear: Linear, gate: tuple[str, ...]) -> FewRowProduct | None:
        if not isinstance(linear, ScaledMmLinear) or linear.weight.is_blocked != self._inputs.has_groups:
            return None
        return self._inputs.few_rows.gated(linear.weight, gate)

    def launch(self, layer: int, linear: Linear, x: Tensor, gate_up: Tensor, out: Tensor) -> bool:
        """Compute ``out = silu(gate) * up`` of a layer's gate_up, unless there is no kernel: then nothing is done.

        Args:
            layer: Decoder layer.
            linear: Its gate_up.
            x: ``[tokens, hidden]``.
            gate_up: ``[tokens, 2 * width]``, contiguous; scratch.
            out: ``[tokens, width]``, in e4m3, too; in e4m3 alone if it has no memory.

        Returns:
            Whether it was computed.
        """
        product = self._products[layer]
        if product is None or len(out) > product.max_rows:
            return False
        result = gate_up.view(-1)[: out.numel()].view(out.shape) if out.is_meta else out
        codes = self._inputs.of(x, has_groups=self._inputs.has_groups)
        product.launch(codes, result, bias=linear.bias, maxima=self._maxima)
        self._quantise.launch(result, self._inputs.to_write(out), maxima=self._maxima)
        return True
