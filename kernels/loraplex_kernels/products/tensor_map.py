"""Tensor maps: how the tensor memory accelerator finds boxes of a matrix (sm_90 and up)."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from cuda.bindings import driver

from loraplex_kernels.fp8_params import TensorMap
from loraplex_kernels.module import DriverError

if TYPE_CHECKING:
    import torch

BOX_COLUMNS: Final = 128
"""Bytes of a box's rows: what the hardware swizzles."""


def byte_map(matrix: torch.Tensor, box_rows: int) -> TensorMap:
    """Return the map of a matrix of one-byte numbers in boxes of 128 columns; it is of no use once the matrix moves.

    Args:
        matrix: ``[rows, columns]``, contiguous, on 16 bytes; columns are a multiple of 16.
        box_rows: Rows of a box, at most 256. What of a box lies outside of the matrix is zeros.

    Raises:
        ValueError: If the matrix is none of one-byte numbers, or not contiguous.
        DriverError: If the driver refuses the map.
    """
    rows, columns = matrix.shape
    if matrix.element_size() != 1 or not matrix.is_contiguous():
        raise ValueError(f"a contiguous matrix of one-byte numbers has a map, not {matrix.dtype} {matrix.stride()}")
    wide, narrow = driver.cuuint64_t, driver.cuuint32_t
    result, encoded = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2,
        matrix.data_ptr(),
        [wide(columns), wide(rows)],
        [wide(columns)],
        [narrow(BOX_COLUMNS), narrow(box_rows)],
        [narrow(1), narrow(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if result != driver.CUresult.CUDA_SUCCESS:
        raise DriverError(f"tensor map of {list(matrix.shape)} in boxes of {box_rows} rows: {result.name}")
    made = TensorMap()
    ctypes.memmove(ctypes.addressof(made), encoded.getPtr(), ctypes.sizeof(made))
    return made
