"""The biases that a base model's projections have of their own, read from its files.

A checkpoint with trained biases (PEFT's ``bias``) holds them as they are after training, and the base's own with them. An
engine adds an adapter's bias on top of the base's, so the store subtracts: only it has the file of both.
"""

from __future__ import annotations

import json
import struct
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from loraplex_common.bfloat16 import from_bfloat16
from loraplex_common.config_values import BaseModelError
from loraplex_common.errors import AdapterIncompatibleError
from loraplex_common.weight_files import Weights, find_weights

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_DTYPES: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class BaseBiases:
    """Reads biases of a base model's projections.

    Args:
        directory: The base model's files; None where they cannot be read.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def of(self, module: str, tensor: str) -> NDArray[np.float64] | None:
        """Return the bias of a module ``[out_features]``, None if the base has none there.

        Args:
            module: Its dotted name in the base model.
            tensor: Name of the checkpoint's tensor that needs it, for messages.

        Raises:
            AdapterIncompatibleError: If the base model's files cannot be read.
        """
        name = f"{module}.bias"
        try:
            weights = self._weights
            return _read(weights.files[name], name) if name in weights.files else None
        except (OSError, ValueError, KeyError, BaseModelError) as error:
            raise AdapterIncompatibleError(
                f"tensor {tensor}: the base model's own bias has to be subtracted, but its files cannot be read: {error}"
            ) from error

    @cached_property
    def _weights(self) -> Weights:
        if self._directory is None:
            raise BaseModelError("no directory is known")
        return find_weights(self._directory)


def _read(path: Path, name: str) -> NDArray[np.float64]:
    """Return one tensor of a safetensors file that `find_weights` has checked."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entry: dict[str, Any] = json.loads(file.read(length))[name]
        begin, end = entry["data_offsets"]
        file.seek(8 + length + begin)
        raw = np.frombuffer(file.read(end - begin), dtype=_DTYPES[entry["dtype"]])
    return (from_bfloat16(raw) if entry["dtype"] == "BF16" else raw).astype(np.float64)
