"""Kernels that quantise activations to e4m3 while they compute them, or as they are."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from loraplex_kernels.fp8_params import Quantised, QuantiseFp8Params, RmsNormFp8Params, SiluMulFp8Params
from loraplex_kernels.module import has_clusters
from loraplex_kernels.pointwise.rms_norm import UNIT_OFFSET, rms_norm_build
from loraplex_kernels.pointwise.silu_mul import SiluMul

if TYPE_CHECKING:
    from loraplex_kernels.module import KernelLibrary

GROUP: Final = 128
"""Columns that share a scale where rows have several."""
GROUPS_MACRO: Final = "GROUPS"
MANY_BLOCK: Final = 256
"""Threads of a gate's CTA where there are many rows."""
MOST_VECTORS: Final = 4
"""A thread of a gate's CTA holds at most so many vectors of 16 bytes of the row: registers spill above."""
SHARES: Final = 2
"""CTAs of a gate's row with one scale, where there are clusters, and their threads at most."""
SHARE_THREADS: Final = 512
QUANTISE_VECTORS: Final = 448
"""Vectors of 16 bytes of a CTA that quantises a share of a row."""
GROUP_THREADS: Final = 256
"""Threads of a gate's CTA where rows have several scales, and vectors of each at most."""
GROUP_VECTORS: Final = 2


class Fp8Rows(NamedTuple):
    """Activations in e4m3.

    Attributes:
        codes: e4m3 ``[rows, width]``.
        scales: fp32; what they are multiplied by: ``[1, rows]`` or, of groups of columns, ``[ceil(width / 128), rows]``.
    """

    codes: torch.Tensor
    scales: torch.Tensor


def row_build(width: int, dtype: torch.dtype, *, has_groups: bool) -> tuple[tuple[str, ...], int]:
    """Return the macros and block size of the kernels whose CTAs hold a row of so many columns."""
    vectors = width * dtype.itemsize // 16
    block = min(1024, -(-vectors // 64) * 32) if vectors > 32 else 32
    return (f"WIDTH={width}", f"THREADS={block}", *group_macros(has_groups=has_groups)), block


def group_macros(*, has_groups: bool) -> tuple[str, ...]:
    """Return the macro that gives rows a scale for each 128 columns."""
    return (GROUPS_MACRO,) if has_groups else ()


class _Quantising:
    """What the three kernels share: the checks of what they write."""

    def __init__(self, library: KernelLibrary, width: int, *, has_groups: bool) -> None:
        self._library, self._width, self._has_groups = library, width, has_groups

    def _set(self, params: Quantised, rows: Fp8Rows, count: int) -> None:
        """Set where ``count`` rows go; the tensors may have more.

        Raises:
            ValueError: If a shape, dtype or device differs.
        """
        check, groups = self._library.check, -(-self._width // GROUP) if self._has_groups else 1
        num_rows = rows.codes.shape[0]
        if num_rows < count:
            raise ValueError(f"{count} rows do not fit {num_rows}")
        params.codes = check("codes", rows.codes, torch.float8_e4m3fn, num_rows, self._width)
        params.scales = check("scales", rows.scales, torch.float32, groups, num_rows)
        params.scale_stride = num_rows


class RmsNormFp8(_Quantising):
    """`RmsNorm`, and its result in e4m3."""

    def __init__(
        self, library: KernelLibrary, hidden_size: int, eps: float, *, has_groups: bool, unit_offset: bool = False
    ) -> None:
        super().__init__(library, hidden_size, has_groups=has_groups)
        defines, block = rms_norm_build(hidden_size, library.dtype)
        defines = (*defines, *group_macros(has_groups=has_groups), *UNIT_OFFSET * unit_offset)
        self._kernel = library.load("rms_norm_fp8", RmsNormFp8Params(eps=eps), block, defines=defines)

    def launch(
        self,
        x: torch.Tensor | None,
        weight: torch.Tensor,
        out: torch.Tensor | None,
        quantised: Fp8Rows,
        *,
        residual: torch.Tensor | None = None,
    ) -> None:
        """Normalise rows, after ``residual += x`` if there is a residual.

        Args:
            x: ``[tokens, hidden]``; None to normalise the residual as it is.
            weight: ``[hidden]``.
            out: ``[tokens, hidden]``; None if nothing reads the result but in e4m3.
            quantised: The same in e4m3; its first rows are written.
            residual: ``[tokens, hidden]``, updated in place.

        Raises:
            ValueError: If a shape, dtype or device differs, or there is neither x nor residual.
        """
        check, dtype, hidden, params = self._library.check, self._library.dtype, self._width, self._kernel.params
        rows = residual if x is None else x
        if rows is None:
            raise ValueError("x or residual is needed")
        params.x = None if x is None else check("x", x, dtype, -1, hidden)
        params.residual = None if residual is None else check("residual", residual, dtype, -1, hidden)
        params.weight = check("weight", weight, dtype, hidden)
        count = rows.shape[0] if out is None else out.shape[0]
        params.out = None if out is None else check("out", out, dtype, -1, hidden)
        self._set(params.quantised, quantised, count)
        self._kernel.launch(count)


class GateCut(NamedTuple):
    """How CTAs share a row of a gate (csrc/pointwise/silu_mul_fp8.cu).

    Attributes:
        shares: CTAs of a row.
        block: Threads of a CTA.
        vectors: Vectors of 16 bytes of a thread.
    """

    shares: int
    block: int
    vectors: int

    @classmethod
    def of(cls, library: KernelLibrary, width: int, *, has_groups: bool) -> GateCut:
        """Return the cut of rows of so many columns: each CTA has whole groups of columns."""
        group = GROUP * library.dtype.itemsize // 16
        groups = -(-width * library.dtype.itemsize // (16 * group))
        if has_groups:
            shares, most = -(-groups * group // (GROUP_THREADS * GROUP_VECTORS)), GROUP_THREADS
        else:
            shares, most = SHARES if has_clusters(library.arch) else 1, SHARE_THREADS
        own = -(-groups // shares) * group
        vectors = -(-own // most)
        return cls(shares, -(-own // (32 * vectors)) * 32, vectors)

    def defines(self, *, has_groups: bool) -> tuple[str, ...]:
        """Return the kernel's macros."""
        cluster = (f"CLUSTER={self.shares}",) * (self.shares > 1 and not has_groups)
        return (f"THREADS={self.block}", f"SHARES={self.shares}", *cluster, *group_macros(has_groups=has_groups))

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a CTA."""
        return 8 + 8 * self.shares + self.block // 32 * 4


class SiluMulFp8(_Quantising):
    """`SiluMul`, and its result in e4m3; with another gate's macros that gate's."""

    def __init__(
        self, library: KernelLibrary, width: int, *, has_groups: bool, macros: tuple[str, ...] = SiluMul.macros
    ) -> None:
        super().__init__(library, width, has_groups=has_groups)
        cut = GateCut.of(library, width, has_groups=has_groups)
        self._shares, self._few_rows, self._few = cut.shares, 0, None
        if cut.vectors <= MOST_VECTORS:
            self._few_rows = sys.maxsize if has_groups else library.num_multiprocessors * 3 // 2
            self._few = library.load(
                "silu_mul_fp8",
                SiluMulFp8Params(),
                cut.block,
                defines=(f"WIDTH={width}", *cut.defines(has_groups=has_groups), *macros),
                shared_bytes=cut.shared_bytes,
            )
        if not has_groups:
            self._many = library.load(
                "silu_mul_fp8_many",
                SiluMulFp8Params(),
                MANY_BLOCK,
                defines=(f"WIDTH={width}", *macros),
                shared_bytes=width * library.dtype.itemsize + MANY_BLOCK // 32 * 4,
            )

    def launch(
        self, gate_up: torch.Tensor, out: torch.Tensor | None, quantised: Fp8Rows, *, delta: torch.Tensor | None = None
    ) -> None:
        """Compute one row per row of ``out``, or of ``gate_up`` where there is none.

        Args:
            gate_up: ``[tokens, 2 * width]``.
            out: ``[tokens, width]``; None if nothing reads the result but in e4m3.
            quantised: The same in e4m3; its first rows are written.
            delta: fp32 ``[tokens, 2 * width]``, added to ``gate_up`` first.

        Raises:
            ValueError: If a shape, dtype or device differs.
        """
        check, dtype, width = self._library.check, self._library.dtype, self._width
        rows = gate_up.shape[0] if out is None else out.shape[0]
        few = self._few if rows <= self._few_rows else None
        kernel = few or self._many
        params = kernel.params
        params.gate_up = check("gate_up", gate_up, dtype, -1, 2 * width)
        params.out = None if out is None else check("out", out, dtype, -1, width)
        params.delta = None if delta is None else check("delta", delta, torch.float32, rows, 2 * width)
        self._set(params.quantised, quantised, rows)
        kernel.launch(rows * self._shares if few else rows)


class QuantiseFp8(_Quantising):
    """Activations in e4m3, as they are.

    Args:
        library: Kernels.
        width: Columns of a row.
        has_groups: Whether each 128 columns have a scale.
        maxima: Parts of a row whose largest absolute values are known; 0 if none are.
    """

    def __init__(self, library: KernelLibrary, width: int, *, has_groups: bool, maxima: int = 0) -> None:
        super().__init__(library, width, has_groups=has_groups)
        self._maxima = maxima
        vectors = width * library.dtype.itemsize // 16
        self._shares = -(-vectors // QUANTISE_VECTORS) if has_groups or maxima else 1
        defines, block = row_build(-(-width // self._shares), library.dtype, has_groups=has_groups)
        defines = (f"WIDTH={width}", *defines[1:], f"SHARES={self._shares}", *(f"MAXIMA={maxima}",) * (maxima > 0))
        self._kernel = library.load("quantise_fp8", QuantiseFp8Params(), block, defines=defines)

    def launch(self, x: torch.Tensor, quantised: Fp8Rows, *, maxima: torch.Tensor | None = None) -> None:
        """Quantise each row of ``x``, ``[tokens, width]``; the first rows of ``quantised`` are written.

        Args:
            x: Rows.
            quantised: Where they go.
            maxima: fp32 ``[tokens or more, maxima]``; given if, and only if, the kernel was made for them.

        Raises:
            ValueError: If a shape, dtype or device differs.
        """
        params, check = self._kernel.params, self._library.check
        if (maxima is None) != (self._maxima == 0):
            raise ValueError(f"a kernel of {self._maxima} maxima of a row")
        params.x = check("x", x, self._library.dtype, -1, self._width)
        params.maxima = None if maxima is None else check("maxima", maxima, torch.float32, -1, self._maxima)
        self._set(params.quantised, quantised, x.shape[0])
        self._kernel.launch(x.shape[0] * self._shares)
