"""Reads a model's weights lazily, tensor by tensor, each cut to what one tensor-parallel rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from loraplex_common.base_model import BaseModelError
from loraplex_common.projections import Split
from loraplex_common.stored_forms.registry import quantisation_of
from loraplex_common.weight_files import IGNORED_SUFFIXES, SERVED_DTYPES, find_weights
from safetensors import safe_open
from torch import Tensor

from loraplex_engine.model.stored_forms.registry import FORM_READERS, UNUSED_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from loraplex_common.stored_forms.quantisation import StoredForm

    from loraplex_engine.model.linear import Linear, LinearForms, StoredLinear

FILE_DTYPES: Final = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}
"""As safetensors names them."""
UNPACKED_ITEMS: Final = 1 << 18
"""Numbers of a weight that are unpacked at once: what loading takes besides the weights is a few times as many bytes."""
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
    """The weights of one model directory; remembers what was read, so that nothing is left out unnoticed.

    Quantised weights are unpacked to the compute dtype, some rows at a time. One file is mapped at a time, so that loading
    takes the memory of the result, of the largest file, and of what the rows need meanwhile.

    Attributes:
        quantisation: How the files store the weights; None if they are whole.
    """

    def __init__(
        self, directory: Path, *, dtype: torch.dtype, device: torch.device, layout: WeightLayout | None = None
    ) -> None:
        self._stored = find_weights(directory)
        self._files = self._stored.files
        self._directory = directory
        self._dtype = dtype
        self._device = device
        self._layout = layout or WeightLayout()
        self._opened: tuple[Path, Any] | None = None
        self.quantisation = quantisation_of(directory)
        ignored = IGNORED_SUFFIXES if self.quantisation is None else (*IGNORED_SUFFIXES, *UNUSED_SUFFIXES)
        self._unread = {name for name in self._files if not name.endswith(ignored)}

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

        A weight that the files store quantised is unpacked, so that the backend gets its dense form.

        Args:
            parts: In the order of their outputs; all have a bias or none has.
            forms: The backend's.

        Raises:
            BaseModelError: If a tensor is missing or of another shape, or cannot be divided over the ranks.
        """
        stored = [self._form_of(part) for part in parts]
        if any(stored):
            weight = self._unpacked(parts, stored)
        else:
            weight = self._stacked((part.weight, part.weight_shape, part.split) for part in parts)
        if not parts[0].has_bias:
            return forms.dense(weight, None)
        return forms.dense(weight, self._stacked((part.bias, (part.out_features,), part.split) for part in parts))

    def _stacked(self, tensors: Iterable[tuple[str, tuple[int, ...], Split | None]]) -> Tensor:
        mapped = [self._mapped(name, shape, split) for name, shape, split in tensors]
        if len(mapped) == 1:  # lm_head may be gigabytes: not converted first and copied then
            return mapped[0].to(device=self._device, dtype=self._dtype, copy=True)
        return torch.cat([part.to(device=self._device, dtype=self._dtype) for part in mapped])

    def _form_of(self, part: StoredLinear) -> StoredForm | None:
        """Return how a weight is stored; None if it is whole, as it may be although config.json does not say so.

        Raises:
            BaseModelError: If config.json says that it is whole, and the files bring it quantised.
        """
        if self.quantisation is None:
            return None
        form = self.quantisation.form_of(self._stored.stored_module(part.name))
        packed = {f"{part.name}.{reader.mark}" for reader in FORM_READERS.values()} & set(self._files)
        is_whole = packed == {part.weight} and self.slice_of(part.weight).get_dtype() in SERVED_DTYPES
        if packed and not is_whole and form is None:
            raise BaseModelError(
                f"{self._files[min(packed)]}: {min(packed)} is quantised, and quantization_config of config.json says that "
                "it is not; fetch config.json again"
            )
        return None if is_whole else form

    def _unpacked(self, parts: Sequence[StoredLinear], forms: Sequence[StoredForm | None]) -> Tensor:
        """Return weights stacked along their outputs, those with a form unpacked some rows at a time."""
        places = [self._layout.local(part.weight, part.weight_shape, part.split) for part in parts]
        bounds = [place.indices(part.out_features)[:2] for (place, _), part in zip(places, parts, strict=True)]
        columns = range(parts[0].in_features)[places[0][1]]
        num_rows = sum(last - first for first, last in bounds)
        weight = torch.empty((num_rows, len(columns)), dtype=self._dtype, device=self._device)
        position = 0
        for part, form, (first, last), (_, inputs) in zip(parts, forms, bounds, places, strict=True):
            into = weight[position : position + last - first]
            position += last - first
            if form is None:
                into.copy_(self._mapped(part.weight, part.weight_shape, part.split))
            else:
                self._unpack(part, form, into, first, inputs)
        return weight

    def _unpack(self, part: StoredLinear, form: StoredForm, into: Tensor, first: int, inputs: slice) -> None:
        unpacker = FORM_READERS[form.name].make(PackedLinear(self, part, self._device), form)
        step = max(1, UNPACKED_ITEMS // part.in_features)
        for begin in range(0, into.shape[0], step):
            end = min(begin + step, into.shape[0])
            into[begin:end].copy_(unpacker.rows(first + begin, first + end)[:, inputs])
        if part.has_bias or part.bias not in self._files:
            return
        if bool(self._mapped(part.bias, (part.out_features,), None).any()):  # AutoGPTQ writes zeros where there is none
            raise BaseModelError(f"{self._directory}: {part.bias} is not zero, and the architecture has no such bias")

    def _mapped(self, name: str, shape: tuple[int, ...], split: Split | None) -> Tensor:
        """Return this rank's part of a tensor as safetensors gives it: memory that is the file's."""
        stored = self.slice_of(name)
        if tuple(stored.get_shape()) != shape:
            raise BaseModelError(
                f"{self._files[name]}: {name} has shape {stored.get_shape()}, config.json implies {list(shape)}"
            )
        if stored.get_dtype() not in SERVED_DTYPES:
            raise BaseModelError(
                f"{self._files[name]}: {name} is stored as {stored.get_dtype()}, and quantization_config of config.json does "
                "not say how; fetch config.json again"
            )
        self._unread.discard(name)
        part: Tensor = stored[self._layout.local(name, shape, split)]
        return part

    def slice_of(self, name: str) -> Any:
        """Return a tensor as a slice of its file, which stays mapped as long as the slice is kept.

        Raises:
            BaseModelError: If it is missing.
        """
        if name not in self._files:
            raise BaseModelError(f"{self._directory}: weight {name} is missing")
        file = self._files[name]
        if self._opened is None or self._opened[0] != file:
            self._opened = file, safe_open(file, framework="pt")
        return self._opened[1].get_slice(self._stored.stored_name(name))

    def mark_read(self, name: str) -> None:
        """Say that a tensor that `slice_of` returned is made use of."""
        self._unread.discard(name)

    def close(self) -> None:
        """Close the files.

        Raises:
            BaseModelError: If the model has weights that nothing read: the decoder would compute something else.
        """
        self._opened = None
        if self._unread:
            some = ", ".join(sorted(self._unread)[:3])
            raise BaseModelError(f"{self._directory}: {len(self._unread)} weights are not known, e.g. {some}")


class PackedLinear:
    """The tensors of one quantised linear layer; see `ModuleTensors`."""

    def __init__(self, reader: WeightReader, part: StoredLinear, device: torch.device) -> None:
        self.name, self.shape, self.device = part.name, part.weight_shape, device
        self._reader = reader

    def has(self, suffix: str) -> bool:
        """See `ModuleTensors`."""
        return self._reader.has(f"{self.name}.{suffix}")

    def take(self, suffix: str, shape: tuple[int, ...] | None, dtypes: tuple[torch.dtype, ...]) -> Any:
        """See `ModuleTensors`."""
        name = f"{self.name}.{suffix}"
        stored = self._reader.slice_of(name)
        found, allowed = stored.get_dtype(), [FILE_DTYPES[dtype] for dtype in dtypes]
        if found not in allowed or (shape is not None and tuple(stored.get_shape()) != shape):
            expected = f"{' or '.join(allowed)}{'' if shape is None else f' {list(shape)}'}"
            raise BaseModelError(
                f"{name} is {found} {stored.get_shape()}, config.json and its quantization_config imply {expected}; fetch "
                "config.json and the weights again"
            )
        self._reader.mark_read(name)
        return stored
