"""Which rows of an adapter's embedding or lm_head are the base model's own: they are compared, slice by slice, and not stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from loraplex_common.bfloat16 import to_bfloat16
from loraplex_common.config_values import BaseModelError
from loraplex_common.errors import AdapterIncompatibleError

from loraplex_adapter_store.checkpoint.base_weights import wide
from loraplex_adapter_store.checkpoint.safetensors_file import NUMPY_DTYPES, SLICE_ITEMS, Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from loraplex_adapter_store.checkpoint.base_weights import BaseWeights, StoredTensor


class BaseRows:
    """The rows of a base model's embedding and of its lm_head.

    Args:
        weights: The base model's files.
        paths: Dotted names of the two in the base model.
        is_tied: Whether config.json ties them, so that one matrix may serve both.
    """

    def __init__(self, weights: BaseWeights, paths: Sequence[str], *, is_tied: bool) -> None:
        self._weights = weights
        self._paths = paths
        self._is_tied = is_tied

    def are_one(self, tensor: Tensor) -> bool:
        """Return whether the two are one matrix: config.json ties them, and the files have not two that differ.

        Args:
            tensor: The checkpoint's tensor that asks, for messages.

        Raises:
            AdapterIncompatibleError: If the base model's files cannot be read.
        """
        if not self._is_tied:
            return False
        try:
            first, second = (self._weights.find(f"{path}.weight") for path in self._paths)
            if first is None or second is None:
                return True
            return first.shape == second.shape and all(
                np.array_equal(first.raw(*span), second.raw(*span)) for span in _spans(first.shape)
            )
        except (OSError, ValueError, KeyError, BaseModelError) as error:
            raise _unreadable(tensor, error) from error

    def changed(self, path: str, tensor: Tensor, num_rows: int) -> NDArray[np.bool_]:
        """Return which rows of a matrix differ from the base's: all behind the base's last, and of the others those that do.

        A row is the base's if its bytes are, or if they are what the file's dtype makes of the base's.

        Args:
            path: Dotted name of the module in the base model.
            tensor: ``[at least num_rows, hidden]``.
            num_rows: Rows of the base's matrix.

        Raises:
            AdapterIncompatibleError: If the base model's files cannot be read.
        """
        differs = np.ones(tensor.shape[0], dtype=np.bool_)
        ours = raw_rows(tensor)
        try:
            stored = self._stored(path)
            for first, last in _spans((num_rows, *tensor.shape[1:])):
                own = ours[first:last]
                differs[first:last] = (_bits(own) != _bits(_rounded(stored, first, last, tensor.dtype))).any(axis=1)
        except (OSError, ValueError, KeyError, BaseModelError) as error:
            raise _unreadable(tensor, error) from error
        return differs

    def changed_tokens(self, path: str, tensor: Tensor, ids: Sequence[int], num_rows: int) -> NDArray[np.bool_]:
        """Return which rows of ``[len(ids), hidden]`` differ from the base's rows of those ids; see `changed`."""
        differs = np.ones(len(ids), dtype=np.bool_)
        ours = raw_rows(tensor)
        try:
            stored = self._stored(path)
            for place, token in enumerate(ids):
                if token < num_rows:
                    own = _rounded(stored, token, token + 1, tensor.dtype)
                    differs[place] = bool((_bits(ours[place : place + 1]) != _bits(own)).any())
        except (OSError, ValueError, KeyError, BaseModelError) as error:
            raise _unreadable(tensor, error) from error
        return differs

    def _stored(self, path: str) -> StoredTensor:
        for each in (path, *self._paths) if self._is_tied else (path,):
            if (found := self._weights.find(f"{each}.weight")) is not None:
                return found
        raise BaseModelError(f"weight {path}.weight is missing")


def raw_rows(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor's values as the file has them, bf16 as uint16; a view."""
    return np.frombuffer(tensor.data, dtype=NUMPY_DTYPES[tensor.dtype]).reshape(tensor.shape)


def _spans(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    step = max(1, SLICE_ITEMS // max(1, int(np.prod(shape[1:]))))
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])


def _rounded(stored: StoredTensor, first: int, last: int, dtype: str) -> NDArray[Any]:
    """Return rows of the base as ``dtype`` holds them."""
    raw = stored.raw(first, last)
    if stored.dtype == dtype:
        return raw
    values = wide(raw, stored.dtype)
    if dtype == "BF16":
        return to_bfloat16(values)
    with np.errstate(over="ignore"):
        return values.astype(NUMPY_DTYPES[dtype])


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    return values.view(f"<u{values.dtype.itemsize}")


def _unreadable(tensor: Tensor, error: Exception) -> AdapterIncompatibleError:
    return AdapterIncompatibleError(
        f"tensor {tensor.name}: its rows have to be compared with the base model's, but its files cannot be read: {error}"
    )
