"""Other layouts of one tensor: transposed, or some of its rows. The bytes are moved, never computed with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from loraplex_adapter_store.checkpoint.safetensors_file import NUMPY_DTYPES, Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from numpy.typing import NDArray


def transposed(tensor: Tensor) -> Tensor:
    """Return the transpose of a matrix, copied; another tensor as it is, for the reader to refuse."""
    return _copied(tensor, _raw(tensor).T) if len(tensor.shape) == 2 else tensor


def with_rows(tensor: Tensor, rows: Sequence[int] | NDArray[np.intp]) -> Tensor:
    """Return some rows of a matrix, or numbers of a vector, in the given order; copied."""
    return _copied(tensor, _raw(tensor)[np.asarray(rows, dtype=np.intp)])


def number(tensor: Tensor) -> float | None:
    """Return the value of a tensor of one number; None if it holds several."""
    values = tensor.values().reshape(-1)
    return float(values[0]) if values.size == 1 else None


def _raw(tensor: Tensor) -> NDArray[Any]:
    return np.frombuffer(tensor.data, dtype=NUMPY_DTYPES[tensor.dtype]).reshape(tensor.shape)


def _copied(tensor: Tensor, values: NDArray[Any]) -> Tensor:
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data.toreadonly()
    return Tensor(tensor.name, tensor.dtype, tuple(values.shape), data)
