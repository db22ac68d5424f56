"""Sets of rows of one matrix that an adapter replaces, as the file has them or with a pair multiplied in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from loraplex_common.low_rank import LowRank
from numpy.typing import NDArray

from loraplex_adapter_store.checkpoint.base_rows import raw_rows
from loraplex_adapter_store.checkpoint.base_weights import wide
from loraplex_adapter_store.checkpoint.dialects.tensor_ops import with_rows
from loraplex_adapter_store.checkpoint.outside_names import EMBED
from loraplex_adapter_store.checkpoint.safetensors_file import ITEM_BYTES, SLICE_ITEMS, Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.projections import Projection

    from loraplex_adapter_store.checkpoint.parts import PartTensors


@dataclass(frozen=True, slots=True)
class RowSet:
    """Rows by token.

    Attributes:
        ids: ``[n]``, rising.
        values: ``[n, hidden]``.
    """

    ids: NDArray[np.intp]
    values: Tensor

    @classmethod
    def none(cls, width: int) -> RowSet:
        """Return the empty set."""
        return cls(np.zeros(0, dtype=np.intp), Tensor.of("no rows", np.zeros((0, width), dtype=np.float32)))

    @classmethod
    def of_matrix(cls, matrix: Tensor, ids: NDArray[np.intp]) -> RowSet:
        """Return some rows of a matrix; copied, unless they follow each other."""
        if not len(ids) or ids[-1] - ids[0] + 1 > len(ids):
            return cls(ids, with_rows(matrix, ids))
        row_bytes = math.prod(matrix.shape[1:]) * ITEM_BYTES[matrix.dtype]
        data = matrix.data[int(ids[0]) * row_bytes : (int(ids[-1]) + 1) * row_bytes]
        return cls(ids, Tensor(matrix.name, matrix.dtype, (len(ids), *matrix.shape[1:]), data))

    def replaced(self, tokens: Sequence[int], values: Tensor, differs: NDArray[np.bool_]) -> RowSet:
        """Return the set with the rows of some tokens replaced; those that do not differ from the base's leave it."""
        given = np.asarray(tokens, dtype=np.intp)
        order = np.argsort(given)
        order = order[differs[order]]
        new = RowSet(given[order], with_rows(values, order))
        kept = np.flatnonzero(~np.isin(self.ids, given))
        if not len(kept):
            return new
        joined = np.concatenate([self.ids[kept], new.ids])
        sorting = np.argsort(joined)
        rows = np.concatenate([_wide_rows(with_rows(self.values, kept)), _wide_rows(new.values)])
        return RowSet(joined[sorting], _tensor(values.name, rows[sorting]))

    def plus(self, pair: PartTensors, projection: Projection) -> RowSet:
        """Return the set with a pair's product added to each row, fp32."""
        if not len(self.ids):
            return self
        part = pair.part
        assert isinstance(part, LowRank), pair.kind
        a, b = (each.values() for each in pair.tensors)
        rows, scaling = raw_rows(self.values), np.float32(part.scaling)
        out = np.empty(rows.shape, dtype=np.float32)
        step = max(1, SLICE_ITEMS // rows.shape[1])
        for first in range(0, len(rows), step):
            ids = self.ids[first : first + step]
            delta = a[:, ids].T @ b.T if projection.name == EMBED else b[ids] @ a
            out[first : first + step] = wide(rows[first : first + step], self.values.dtype) + scaling * delta
        name = f"{self.values.name} plus {pair.tensors[1].name} times {pair.tensors[0].name}"
        return RowSet(self.ids, _tensor(name, out))


def first_rows(tensor: Tensor, count: int) -> Tensor:
    """Return the first rows of a matrix; a view."""
    if tensor.shape[0] == count:
        return tensor
    return RowSet.of_matrix(tensor, np.arange(count)).values


def columns_of(tensor: Tensor, count: int) -> Tensor:
    """Return the first columns of a matrix; copied if it has more."""
    if tensor.shape[1] == count:
        return tensor
    raw = np.ascontiguousarray(raw_rows(tensor)[:, :count])
    return Tensor(tensor.name, tensor.dtype, raw.shape, _bytes(raw))


def _tensor(name: str, values: NDArray[np.float32]) -> Tensor:
    """Return a tensor that is a view of values: rows may be gigabytes."""
    return Tensor(name, "F32", values.shape, _bytes(values))


def _bytes(values: NDArray[Any]) -> memoryview:
    return values.reshape(-1).view(np.uint8).data.toreadonly()


def _wide_rows(tensor: Tensor) -> NDArray[np.float32]:
    return wide(raw_rows(tensor), tensor.dtype)
