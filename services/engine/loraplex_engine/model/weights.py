"""Reads a model's weights lazily, tensor by tensor, each cut to what one tensor-parallel rank holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from loraplex_common.base_model import BaseModelError
from loraplex_common.heap import give_back_freed
from loraplex_common.stored_forms.registry import quantisation_of
from loraplex_common.weight_files import IGNORED_SUFFIXES, SERVED_DTYPES, find_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraplex_engine.model.fp8_reading import AddedError, Place, read_fp8
from loraplex_engine.model.stored_forms.packed_linear import PackedLinear
from loraplex_engine.model.stored_forms.registry import FORM_READERS, UNUSED_SUFFIXES
from loraplex_engine.model.weight_form import WeightForm
from loraplex_engine.model.weight_layout import WeightLayout as WeightLayout

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from loraplex_common.stored_forms.quantisation import StoredForm

    from loraplex_engine.model.linear import Linear, LinearForms, StoredLinear
    from loraplex_engine.model.stored_forms.unpacker import Unpacker
    from loraplex_engine.model.weight_layout import Index

UNPACKED_ITEMS: Final = 1 << 16
"""Numbers of a weight that are unpacked at once in host memory: loading takes about fifty times as many bytes beside the weights."""
DEVICE_CHUNKS: Final = 4
"""How many times as many are unpacked at once on a device, where each operation costs a launch."""
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


def _open(file: Path) -> Any:
    """Map a file of weights.

    Raises:
        BaseModelError: If it cannot be read, or its header is not what the format says.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise BaseModelError(f"{file}: {error}; fetch it again") from error


class WeightReader:
    """The weights of one model directory; remembers what was read, so that nothing is left out unnoticed.

    Quantised weights are unpacked to the compute dtype, some rows at a time. One file is mapped at a time, so that loading
    takes the memory of the result, of the largest file, and of what the rows need meanwhile.

    Attributes:
        quantisation: How the files store the weights; None if they are whole.
        dtype: The compute dtype.
        device: Where the weights are.
        added_error: What quantising whole or 4-bit weights to FP8 has added.
    """

    def __init__(
        self,
        directory: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        layout: WeightLayout | None = None,
        form: WeightForm = WeightForm.WHOLE,
    ) -> None:
        self._stored = find_weights(directory)
        self._files = self._stored.files
        self._directory = directory
        self.dtype = dtype
        self.device = device
        self._layout = layout or WeightLayout()
        self._form, self.added_error = form, AddedError()
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
        return self._mapped(name, shape, self._layout.local(name, shape)).to(
            device=self.device, dtype=self.dtype, copy=True
        )

    def linear(self, parts: Sequence[StoredLinear], forms: LinearForms) -> Linear:
        """Return this rank's part of linear layers that share their input, stacked along their outputs; a copy, too.

        A weight that the files store quantised is unpacked, so that the backend gets its dense form, unless weights are to be
        FP8: then those that are in e4m3 stay so, and others are quantised, if the backend's forms have it.

        Args:
            parts: In the order of their outputs; all have a bias or none has.
            forms: The backend's.

        Raises:
            BaseModelError: If a tensor is missing or of another shape, or cannot be divided over the ranks.
        """
        stored = [self._form_of(part) for part in parts]
        bias: Tensor | None = None
        if parts[0].has_bias:
            bias = self._bias(parts)
        if forms.fp8 is not None and self._reads_fp8(stored):
            quantised = read_fp8(self, parts, stored, self.added_error)
            if quantised is not None:
                return forms.fp8(quantised, bias)
        if any(stored):
            weight = self._unpacked(parts, stored)
        else:
            weight = self._stacked((part.weight, part.weight_shape, self._layout.weight(part)) for part in parts)
        return forms.dense(weight, bias)

    def _reads_fp8(self, stored: Sequence[StoredForm | None]) -> bool:
        """Tell whether a layer becomes FP8; what a quantised checkpoint leaves whole stays whole."""
        return self._form is WeightForm.FP8 and (self.quantisation is None or any(stored))

    def _bias(self, parts: Sequence[StoredLinear]) -> Tensor | None:
        """Return this rank's bias; None where another rank adds it to the sum of all."""
        indices = [self._layout.bias(part) for part in parts]
        if any(indices):
            return self._stacked((p.bias, (p.out_features,), index) for p, index in zip(parts, indices, strict=True))
        for part in parts:
            self._mapped(part.bias, (part.out_features,), (slice(None),))
        return None

    def _stacked(self, tensors: Iterable[tuple[str, tuple[int, ...], tuple[Index, ...]]]) -> Tensor:
        mapped = [self._mapped(name, shape, index) for name, shape, indices in tensors for index in indices]
        if len(mapped) == 1:  # lm_head may be gigabytes: not converted first and copied then
            return mapped[0].to(device=self.device, dtype=self.dtype, copy=True)
        return torch.cat([part.to(device=self.device, dtype=self.dtype) for part in mapped])

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
        places = [place for part in parts for place in self._places(part)]
        num_rows = sum(place.last - place.first for place in places)
        weight = torch.empty((num_rows, places[0].end - places[0].begin), dtype=self.dtype, device=self.device)
        position = 0
        for part, form in zip(parts, forms, strict=True):
            for rows in self.rows(part, form):
                weight[position : position + len(rows)].copy_(rows)
                position += len(rows)
        give_back_freed()
        return weight

    def place(self, part: StoredLinear) -> Place:
        """Return this rank's part of a layer.

        Raises:
            BaseModelError: If it has several.
        """
        places = self._places(part)
        if len(places) > 1:
            raise BaseModelError(
                f"{part.name}: ranks hold several parts of its outputs, which FP8 products do not take"
            )
        return places[0]

    def _places(self, part: StoredLinear) -> list[Place]:
        return [
            Place(*outputs.indices(part.out_features)[:2], *inputs.indices(part.in_features)[:2])
            for outputs, inputs in self._layout.weight(part)
        ]

    def rows(self, part: StoredLinear, form: StoredForm | None) -> Iterator[Tensor]:
        """Yield this rank's rows of a layer's weight in order, some at a time, in any floating-point type, on the device.

        Args:
            part: The layer.
            form: How it is stored; None if it is whole.

        Raises:
            BaseModelError: If a tensor is missing or does not fit.
        """
        items = UNPACKED_ITEMS * (1 if self.device.type == "cpu" else DEVICE_CHUNKS)
        step = max(1, items // part.in_features)
        unpacker = self.unpacker(part, form) if form else None
        for place, index in zip(self._places(part), self._layout.weight(part), strict=True):
            whole = None if form else self._mapped(part.weight, part.weight_shape, index)
            for begin in range(place.first, place.last, step):
                end = min(begin + step, place.last)
                if unpacker is not None:
                    yield unpacker.rows(begin, end)[:, place.begin : place.end]
                elif whole is not None:
                    yield whole[begin - place.first : end - place.first].to(self.device)

    def unpacker(self, part: StoredLinear, form: StoredForm) -> Unpacker:
        """Return what unpacks a layer's weight.

        Raises:
            BaseModelError: If a tensor is missing or does not fit.
        """
        # AutoGPTQ writes a bias of zeros where there is none.
        is_extra = not part.has_bias and part.bias in self._files
        if is_extra and bool(self._mapped(part.bias, (part.out_features,), (slice(None),)).any()):
            raise BaseModelError(f"{self._directory}: {part.bias} is not zero, and the architecture has no such bias")
        return FORM_READERS[form.name].make(PackedLinear(self, part, self.device), form)

    def _mapped(self, name: str, shape: tuple[int, ...], index: Index) -> Tensor:
        """Return a part of a tensor as safetensors gives it: memory that is the file's."""
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
        part: Tensor = stored[index]
        return part

    def slice_of(self, name: str) -> Any:
        """Return a tensor as a slice of its file, which stays mapped as long as the slice is kept.

        Raises:
            BaseModelError: If it is missing, or its file cannot be read.
        """
        if name not in self._files:
            raise BaseModelError(f"{self._directory}: weight {name} is missing")
        file = self._files[name]
        if self._opened is None or self._opened[0] != file:
            self._opened = file, _open(file)
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
