"""bfloat16 in numpy, which has no such type: values travel as the upper 16 bits of their fp32 form, in uint16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_QUIET_NAN: Final = np.uint16(0x7FC0)
_MAGNITUDE: Final = np.uint16(0x7FFF)
_INFINITY: Final = np.uint16(0x7F80)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round fp32 to the bits of bf16, to nearest even; NaN stays NaN."""
    contiguous = np.ascontiguousarray(values, dtype=np.float32)
    out = np.empty(contiguous.shape, dtype=np.uint16)
    round_into(contiguous, out, np.empty(contiguous.shape, dtype=np.uint32))
    out[np.isnan(contiguous)] = _QUIET_NAN
    return out


def round_into(values: NDArray[np.float32], out: NDArray[np.uint16], scratch: NDArray[np.uint32]) -> None:
    """Round to nearest even into ``out``, allocating nothing; all three have one shape. NaN is not handled."""
    bits = values.view(np.uint32)
    np.right_shift(bits, 16, out=scratch)
    scratch &= 1  # ties go to the even neighbour
    scratch += 0x7FFF
    scratch += bits
    scratch >>= 16
    np.copyto(out, scratch, casting="unsafe")


def is_finite(bits: NDArray[np.uint16]) -> bool:
    """Return whether no value is infinite or NaN."""
    return bits.size == 0 or bool((bits & _MAGNITUDE).max() < _INFINITY)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen the bits of bf16 to fp32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
