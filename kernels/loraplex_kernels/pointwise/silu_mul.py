"""An MLP's gate, through SiLU or GELU, times up."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from loraplex_kernels.params import SiluMulParams

if TYPE_CHECKING:
    from loraplex_kernels.module import KernelLibrary


class SiluMul:
    """``out = silu(gate) * up`` over rows ``[gate | up]``."""

    macros: ClassVar[tuple[str, ...]] = ()

    def __init__(self, library: KernelLibrary, width: int) -> None:
        self._library, self._width = library, width
        self._kernel = library.load("silu_mul", SiluMulParams(), 256, defines=(f"WIDTH={width}", *self.macros))
        self._blocks = -(-width * library.dtype.itemsize // (256 * 16))

    def launch(self, gate_up: torch.Tensor, out: torch.Tensor, *, delta: torch.Tensor | None = None) -> None:
        """Compute one row per row of ``out``.

        Args:
            gate_up: ``[tokens, 2 * width]``.
            out: ``[tokens, width]``.
            delta: fp32 ``[tokens, 2 * width]``, added to ``gate_up`` first.

        Raises:
            ValueError: If a shape, dtype or device differs.
        """
        params = self._kernel.params
        params.gate_up = self._library.check("gate_up", gate_up, self._library.dtype, -1, 2 * self._width)
        params.out = self._library.check("out", out, self._library.dtype, -1, self._width)
        width = 2 * self._width
        params.delta = (
            None if delta is None else self._library.check("delta", delta, torch.float32, out.shape[0], width)
        )
        self._kernel.launch(self._blocks, out.shape[0])


class GeluMul(SiluMul):
    """``out = gelu(gate) * up`` over rows ``[gate | up]``, with GELU in its approximation by tanh."""

    macros = ("GELU_TANH",)
