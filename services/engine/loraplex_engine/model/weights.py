"""Reads a model's weights lazily, tensor by tensor, each cut to what one tensor-parallel rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from loraplex_common.base_model import BaseModelError
from loraplex_common.projections import Split
from loraplex_common.weight_files import IGNORED_SUFFIXES, find_weights
from safetensors import safe_open
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from loraplex_engine.model.linear import Linear, LinearForms, StoredLinear

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightLayout:
    """Which part of each weight a tensor-parallel rank holds."""

    tp_degree: int = 1
    tp_rank: int = 0

    def local(self, name: str, shape: tuple[int, ...], split: Split | None = None) -> tuple[slice, ...]:
        """Return the index of this rank's part of a tensor.

        Args:
            name: For messages.
            shape: Full shape: a weight ``[outputs, inputs]`` or a bias ``[outputs]``.
            split: How the ranks divide the linear layer; a bias of one that is split along its inputs is not divided.

        Raises:
            BaseModelError: If the dimension cannot be divided evenly.
        """
        axis = {Split.OUTPUTS: 0, Split.INPUTS: 1, None: len(shape)}[split]
        if axis >= len(shape) or self.tp_degree == 1:
            return (slice(None),) * len(shape)
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
        """Return a tensor that every rank holds whole, in the compute dtype, on the device."""
        ...

    def linear(self, parts: Sequence[StoredLinear], forms: LinearForms) -> Linear:
        """Return one or several linear layers as one, stacked along their outputs; all have a bias or none has."""
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
        """Return a tensor that every rank holds whole, in the compute dtype, on the device.

        It is a copy: a process that writes to the files of a running engine changes nothing of what it computes.

        Args:
            name: As in the files.
            shape: Full shape that config.json implies.

        Raises:
            BaseModelError: If it is missing or of another shape.
        """
        return self._mapped(name, shape, None).to(device=self._device, dtype=self._dtype, copy=True)

    def linear(self, parts: Sequence[StoredLinear], forms: LinearForms) -> Linear:
        """Return this rank's part of linear layers that share their input, stacked along their outputs; a copy, too.

        The form in which the files store the weights decides which of the backend's forms it becomes.

        Args:
            parts: In the order of their outputs; all have a bias or none has.
            forms: The backend's.

        Raises:
            BaseModelError: If a tensor is missing or of another shape, or cannot be divided over the ranks.
        """
        weight = self._stacked((part.weight, part.weight_shape, part.split) for part in parts)
        if not parts[0].has_bias:
            return forms.dense(weight, None)
        return forms.dense(weight, self._stacked((part.bias, (part.out_features,), part.split) for part in parts))

    def _stacked(self, tensors: Iterable[tuple[str, tuple[int, ...], Split | None]]) -> Tensor:
        mapped = [self._mapped(name, shape, split) for name, shape, split in tensors]
        if len(mapped) == 1:  # lm_head may be gigabytes: not converted first and copied then
            return mapped[0].to(device=self._device, dtype=self._dtype, copy=True)
        return torch.cat([part.to(device=self._device, dtype=self._dtype) for part in mapped])

    def _mapped(self, name: str, shape: tuple[int, ...], split: Split | None) -> Tensor:
        """Return this rank's part of a tensor as safetensors gives it: memory that is the file's."""
        if name not in self._files:
            raise BaseModelError(f"{self._directory}: weight {name} is missing")
        file = self._files[name]
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt")
        stored = self._opened[file].get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise BaseModelError(f"{file}: {name} has shape {stored.get_shape()}, config.json implies {list(shape)}")
        self._unread.discard(name)
        part: Tensor = stored[self._layout.local(name, shape, split)]
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
