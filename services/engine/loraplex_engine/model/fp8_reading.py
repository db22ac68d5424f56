"""Reads linear layers as e4m3: numbers and scales as the files have them, or quantised on load with a scale for each output."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from loraplex_engine.model.fp8 import E4M3, Fp8Weight, quantise
from loraplex_engine.model.weight_form import FP8_BLOCK, keeps_fp8

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loraplex_common.stored_forms.quantisation import StoredForm
    from torch import Tensor

    from loraplex_engine.model.linear import StoredLinear
    from loraplex_engine.model.stored_forms.unpacker import Unpacker


class Place(NamedTuple):
    """This rank's part of a linear layer: outputs ``[first, last)`` and inputs ``[begin, end)``."""

    first: int
    last: int
    begin: int
    end: int


class LinearSource(Protocol):
    """Where linear layers are read from; `WeightReader` is one."""

    device: torch.device
    dtype: torch.dtype

    def place(self, part: StoredLinear) -> Place:
        """Return this rank's part of a layer."""
        ...

    def unpacker(self, part: StoredLinear, form: StoredForm) -> Unpacker:
        """Return what unpacks a layer's weight."""
        ...

    def rows(self, part: StoredLinear, form: StoredForm | None) -> Iterator[Tensor]:
        """Yield this rank's rows of a layer's weight in order, some at a time, in any floating-point type, on the device."""
        ...


class AddedError:
    """What quantising on load has added: the norm of all differences over the norm of all weights."""

    def __init__(self) -> None:
        self._differences: list[Tensor] = []
        self._squares: list[Tensor] = []

    def count(self, rows: Tensor, codes: Tensor, scales: Tensor) -> None:
        """Count some rows of a weight, fp32 ``[rows, inputs]``, and what they have become."""
        difference = torch.linalg.vector_norm(codes.float().mul_(scales).sub_(rows)).double().square()
        self._differences.append(difference)
        self._squares.append(torch.linalg.vector_norm(rows).double().square())
        if len(self._squares) > 1024:
            self._differences, self._squares = [sum_of(self._differences)], [sum_of(self._squares)]

    @property
    def relative(self) -> float | None:
        """The relative error; None if nothing was quantised."""
        if not self._squares:
            return None
        return float((sum_of(self._differences) / sum_of(self._squares).clamp_min(1e-300)).sqrt())


def sum_of(values: Sequence[Tensor]) -> Tensor:
    """Return a sum of numbers on the device."""
    return torch.stack(list(values)).sum()


def read_fp8(
    source: LinearSource, parts: Sequence[StoredLinear], forms: Sequence[StoredForm | None], error: AddedError
) -> Fp8Weight | None:
    """Return layers that share their input as one weight in e4m3; None if they have to be read whole.

    Whole they are if the files mix whole and quantised ones, or blocks that do not fit together.

    Args:
        source: Where from.
        parts: In the order of their outputs.
        forms: How each is stored; all None: they are whole in the files, and quantised here.
        error: Counts what quantising adds.
    """
    stored = [form for form in forms if form is not None]
    if stored and len(stored) < len(forms):
        return None
    if stored and all(keeps_fp8(form) for form in stored):
        return _as_stored(source, parts, stored)
    codes, scales = [], []
    for part, form in zip(parts, forms, strict=True):
        for rows in source.rows(part, form):
            wide = rows.float()
            made = quantise(wide)
            error.count(wide, *made)
            codes.append(made[0])
            scales.append(made[1])
    return Fp8Weight(_stacked(codes), torch.cat(scales), is_blocked=False, dtype=source.dtype)


def _as_stored(source: LinearSource, parts: Sequence[StoredLinear], forms: Sequence[StoredForm]) -> Fp8Weight | None:
    places = [source.place(part) for part in parts]
    unpackers = [source.unpacker(part, form) for part, form in zip(parts, forms, strict=True)]
    scales = [_scales_of_outputs(unpacker, place) for unpacker, place in zip(unpackers, places, strict=True)]
    is_blocked = all(each is None for each in scales)
    if is_blocked:
        grids = [_scales_of_blocks(unpacker, place) for unpacker, place in zip(unpackers, places, strict=True)]
        heights = [place.last - place.first for place in places]
        if any(height % FP8_BLOCK for height in heights[:-1]) or any(grid is None for grid in grids):
            return None
        scales = grids
    found = [each for each in scales if each is not None]
    if len(found) < len(parts):
        return None
    numbers = [
        unpacker.numbers(place.first, place.last)[:, place.begin : place.end].to(source.device)
        for unpacker, place in zip(unpackers, places, strict=True)
    ]
    return Fp8Weight(_stacked(numbers), torch.cat(found), is_blocked=is_blocked, dtype=source.dtype)


def _scales_of_outputs(unpacker: Unpacker, place: Place) -> Tensor | None:
    """Return a scale for each output, fp32 ``[outputs, 1]``; None if an output has several."""
    scales = unpacker.scales
    if scales.shape[1] > 1 and bool((scales != scales[:, :1]).any()):
        return None
    rows = torch.arange(place.first, place.last, device=scales.device) // unpacker.outputs_per_scale
    return scales[rows, :1].contiguous()


def _scales_of_blocks(unpacker: Unpacker, place: Place) -> Tensor | None:
    """Return this rank's scales of blocks; None if the rank's part cuts a block."""
    if place.first % FP8_BLOCK or place.begin % FP8_BLOCK:
        return None
    rows = slice(place.first // FP8_BLOCK, -(-place.last // FP8_BLOCK))
    return unpacker.scales[rows, place.begin // FP8_BLOCK : -(-place.end // FP8_BLOCK)].contiguous()


def _stacked(codes: Sequence[Tensor]) -> Tensor:
    """Return numbers stacked along their outputs, as e4m3 of its own: torch concatenates bytes."""
    return torch.cat([each.contiguous().view(torch.uint8) for each in codes]).view(E4M3)
