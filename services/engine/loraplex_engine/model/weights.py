"""Reads a model's weights lazily, tensor by tensor, each cut to what one tensor-parallel rank holds."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from loraplex_common.base_model import BaseModelError
from loraplex_common.weight_files import IGNORED_SUFFIXES, find_weights
from safetensors import safe_open
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMN_PARALLEL: Final = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})
ROW_PARALLEL: Final = frozenset({"o_proj", "down_proj"})


class Split(enum.Enum):
    """How tensor-parallel ranks divide a weight."""

    NONE = "none"
    OUTPUTS = "outputs"  # dimension 0
    INPUTS = "inputs"  # dimension 1


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightLayout:
    """Which part of each weight a rank holds: the one place that knows how the model is sharded."""

    tp_degree: int = 1
    tp_rank: int = 0

    def split_of(self, name: str) -> Split:
        """Return how ranks divide the weight of that name."""
        parts = name.split(".")
        if len(parts) < 2 or parts[-2] not in COLUMN_PARALLEL | ROW_PARALLEL:
            return Split.NONE
        if parts[-2] not in ROW_PARALLEL:
            return Split.OUTPUTS
        return Split.INPUTS if parts[-1] == "weight" else Split.NONE

    def local(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Return the index of this rank's part of a weight of the given full shape.

        Raises:
            BaseModelError: If the dimension cannot be divided evenly.
        """
        split = self.split_of(name)
        if split is Split.NONE or self.tp_degree == 1:
            return (slice(None),) * len(shape)
        axis = 0 if split is Split.OUTPUTS else 1
        if shape[axis] % self.tp_degree:
            raise BaseModelError(f"{name}: {shape[axis]} cannot be divided over {self.tp_degree} ranks")
        size = shape[axis] // self.tp_degree
        part = slice(self.tp_rank * size, (self.tp_rank + 1) * size)
        return tuple(part if dimension == axis else slice(None) for dimension in range(len(shape)))


class WeightSource(Protocol):
    """Where a decoder gets its weights; see `WeightReader`."""

    def has(self, name: str) -> bool:
        """Tell whether the model has a tensor of that name."""
        ...

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return this rank's part of a weight of the given full shape, in the compute dtype, on the device."""
        ...

    def read_stacked(self, parts: Iterable[tuple[str, tuple[int, ...]]]) -> Tensor:
        """Return several weights stacked along their outputs."""
        ...

    def close(self) -> None:
        """Say that all weights have been read."""
        ...


class WeightReader:
    """The weights of one model directory; remembers what was read, so that nothing is left out unnoticed."""

    def __init__(
        self, directory: Path, *, dtype: torch.dtype, device: torch.device, layout: WeightLayout | None = None
    ) -> None:
        self._files = find_weights(directory).files
        self._directory = directory
        self._dtype = dtype
        self._device = device
        self._layout = layout or WeightLayout()
        self._opened: dict[Path, Any] = {}
        self._unread = {name for name in self._files if not name.endswith(IGNORED_SUFFIXES)}

    def has(self, name: str) -> bool:
        """Tell whether the model has a tensor of that name."""
        return name in self._files

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return this rank's part of a weight in the compute dtype, on the device.

        It is a copy: whoever writes to the file of a running engine changes nothing of what it computes.

        Args:
            name: As in the files.
            shape: Full shape that config.json implies.

        Raises:
            BaseModelError: If it is missing or of another shape.
        """
        return self._mapped(name, shape).to(device=self._device, dtype=self._dtype, copy=True)

    def read_stacked(self, parts: Iterable[tuple[str, tuple[int, ...]]]) -> Tensor:
        """Return several weights stacked along their outputs, as a fused projection wants them; a copy, too."""
        mapped = [self._mapped(name, shape) for name, shape in parts]
        return torch.cat([part.to(device=self._device, dtype=self._dtype) for part in mapped])

    def _mapped(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return this rank's part of a weight as safetensors gives it: memory that is the file's."""
        if name not in self._files:
            raise BaseModelError(f"{self._directory}: weight {name} is missing")
        file = self._files[name]
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt")
        stored = self._opened[file].get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise BaseModelError(f"{file}: {name} has shape {stored.get_shape()}, config.json implies {list(shape)}")
        self._unread.discard(name)
        part: Tensor = stored[self._layout.local(name, shape)]
        return part

    def close(self) -> None:
        """Close the files.

        Raises:
            BaseModelError: If the model has weights that nothing read: the decoder would compute something else.
        """
        self._opened.clear()
        if self._unread:
            some = ", ".join(sorted(self._unread)[:3])
            raise BaseModelError(f"{self._directory}: {len(self._unread)} weights are not known, e.g. {some}")
