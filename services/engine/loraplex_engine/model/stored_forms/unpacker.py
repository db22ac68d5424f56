"""What all stored forms share: ``W = (numbers - zeros) * scales``, computed in fp32, some rows at a time.

An integer of up to 8 bits times a scale of fp16 or bf16, and an e4m3 number times one, is exact in fp32, so that the compute
dtype rounds once, which fp32 itself need not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from loraplex_common.base_model import BaseModelError
from torch import Tensor

if TYPE_CHECKING:
    from loraplex_common.stored_forms.quantisation import StoredForm

Numbers: TypeAlias = Callable[[int, int], Tensor]
"""Returns the stored numbers of rows ``[first, last)`` of W, ``[last - first, in_features]``, of any dtype."""


class ModuleTensors(Protocol):
    """The tensors of one quantised linear layer."""

    name: str
    shape: tuple[int, int]
    device: torch.device

    def has(self, suffix: str) -> bool:
        """Tell whether the files have ``NAME.suffix``."""
        ...

    def take(self, suffix: str, shape: tuple[int, ...] | None, dtypes: tuple[torch.dtype, ...]) -> Any:
        """Return ``NAME.suffix`` as a slice of the file; a None shape is any.

        Raises:
            BaseModelError: If it is missing, or of another shape or dtype.
        """
        ...


@dataclass(frozen=True, slots=True)
class Unpacker:
    """Computes rows of a weight.

    Attributes:
        numbers: The stored numbers.
        scales: ``[outputs of blocks, groups of inputs]`` in fp32, on the device.
        zeros: The same of stored zeros; None if zero is stored as 0.
        outputs_per_scale: Rows of W that share a row of `scales`.
        group_of_input: Which column of `scales` an input has, ``[in_features]``, int64.
    """

    numbers: Numbers
    scales: Tensor
    zeros: Tensor | None
    outputs_per_scale: int
    group_of_input: Tensor

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows ``[first, last)`` of W, ``[last - first, in_features]`` in fp32, on the device."""
        index = torch.arange(first, last, device=self.scales.device) // self.outputs_per_scale
        values = self.numbers(first, last).to(device=self.scales.device, dtype=torch.float32)
        if self.zeros is not None:
            values = values - self._of_rows(self.zeros, index)
        return values * self._of_rows(self.scales, index)

    def _of_rows(self, table: Tensor, index: Tensor) -> Tensor:
        return table[index].index_select(1, self.group_of_input)


SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def scale_grid(form: StoredForm, shape: tuple[int, int]) -> tuple[int, int]:
    """Return how many blocks of outputs and of inputs a weight of ``[outputs, inputs]`` has."""
    outputs, inputs = shape
    return math.ceil(outputs / (form.block[0] or outputs)), math.ceil(inputs / (form.block[1] or inputs))


def read_scales(tensors: ModuleTensors, form: StoredForm, grid: tuple[int, int]) -> Tensor:
    """Return the scales, one for each block in the order of the files, fp32, shaped like ``grid``; one may do for all.

    Raises:
        BaseModelError: If they are missing or do not fit, or one is NaN or infinite.
    """
    suffix = next((each for each in form.scales if tensors.has(each)), form.scales[0])
    stored = tensors.take(suffix, None, SCALE_DTYPES)
    found: Tensor = stored[:] if stored.get_shape() else stored[...]
    if found.numel() not in (1, math.prod(grid)) or (
        found.dim() > 1 and found.numel() > 1 and tuple(found.shape) != grid
    ):
        raise BaseModelError(
            f"{tensors.name}.{suffix} has shape {list(found.shape)}, quantization_config implies {list(grid)}; "
            "fetch config.json and the weights again"
        )
    refuse_infinite(f"{tensors.name}.{suffix}", found)
    return found.to(device=tensors.device, dtype=torch.float32).reshape(-1).expand(math.prod(grid)).reshape(grid)


def refuse_infinite(name: str, values: Tensor) -> None:
    """Refuse scales that would make a whole block of a weight NaN or infinite, and so every answer.

    Raises:
        BaseModelError: If a value is NaN or infinite.
    """
    if not bool(torch.isfinite(values).all()):
        raise BaseModelError(f"{name} holds NaN or infinity; fetch the weights again")


def groups_of_inputs(tensors: ModuleTensors, form: StoredForm, suffix: str, num_groups: int) -> Tensor:
    """Return the group of each input, ``[in_features]``: as the index tensor ``NAME.suffix`` says, else in order.

    An index of nothing but -1 was never filled in.

    Raises:
        BaseModelError: If the index is missing though inputs are reordered, or names a group that does not exist.
    """
    inputs = tensors.shape[1]
    in_order = torch.arange(inputs, device=tensors.device) // (form.block[1] or inputs)
    if not form.is_reordered and not tensors.has(suffix):
        return in_order
    index: Tensor = tensors.take(suffix, (inputs,), (torch.int32, torch.int64))[:].to(tensors.device, torch.int64)
    if not form.is_reordered and bool((index == -1).all()):
        return in_order
    if int(index.min()) < 0 or int(index.max()) >= num_groups:
        raise BaseModelError(
            f"{tensors.name}.{suffix} names groups from {int(index.min())} to {int(index.max())}, there are {num_groups}; "
            "fetch config.json and the weights again"
        )
    return index


def unpack_words(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Return the unsigned numbers of 32-bit words, the lowest bits first, along a new last dimension.

    Args:
        words: int32 of any shape.
        bits: Bits of one number; a divisor of 32.
        order: Where in a word each number lies; in order if None.
    """
    places = torch.tensor(order or tuple(range(32 // bits)), dtype=torch.int32, device=words.device)
    return (words.unsqueeze(-1) >> (places * bits)) & ((1 << bits) - 1)
