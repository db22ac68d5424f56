"""Tensors of a base model's files, read without torch and a piece at a time."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from loraplex_common.bfloat16 import from_bfloat16
from loraplex_common.config_values import BaseModelError
from loraplex_common.weight_files import Weights, find_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

DTYPES: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor of a safetensors file lies.

    Attributes:
        dtype: As the file says it, a key of `DTYPES`.
        offset: First byte in the file.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def raw(self, first: int, last: int) -> NDArray[Any]:
        """Return ``[first, last)`` of its first dimension as stored, bf16 as uint16.

        Raises:
            OSError: If the file cannot be read.
        """
        width = math.prod(self.shape[1:])
        dtype = np.dtype(DTYPES[self.dtype])
        found = np.fromfile(
            self.path, dtype=dtype, count=(last - first) * width, offset=self.offset + first * width * dtype.itemsize
        )
        return found.reshape(last - first, *self.shape[1:])


class BaseWeights:
    """Finds tensors of a base model.

    Args:
        directory: The base model's files; None where they cannot be read.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def find(self, name: str) -> StoredTensor | None:
        """Return a tensor; None if the base has none of that name.

        Raises:
            OSError: If its file cannot be read.
            ValueError: If its file is damaged; so with `KeyError` and `BaseModelError`, also where no directory is known.
        """
        weights = self._weights
        return _stored(weights.files[name], weights.stored_name(name)) if name in weights.files else None

    @cached_property
    def _weights(self) -> Weights:
        if self._directory is None:
            raise BaseModelError("no directory is known")
        return find_weights(self._directory)


def wide(raw: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return values as stored in fp32; those of fp64 are rounded."""
    return from_bfloat16(raw) if dtype == "BF16" else raw.astype(np.float32, copy=False)


def _stored(path: Path, name: str) -> StoredTensor:
    """Read one entry of a safetensors file that `find_weights` has checked."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entry: dict[str, Any] = json.loads(file.read(length))[name]
    return StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
