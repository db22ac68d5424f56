"""bitsandbytes: 4-bit codes of a table, in blocks that run over the flattened weight, and rows of INT8.

Source: ``bitsandbytes.functional`` (``quantize_4bit``, ``QuantState.as_dict``, ``int8_vectorwise_dequant``).
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Final

import torch
from loraplex_common.base_model import BaseModelError

from loraplex_engine.model.stored_forms.unpacker import Unpacker, refuse_infinite

if TYPE_CHECKING:
    from loraplex_common.stored_forms.quantisation import StoredForm
    from torch import Tensor

    from loraplex_engine.model.stored_forms.unpacker import ModuleTensors

MARK = "weight"
CODES: Final = 16
NESTED_CODES: Final = 256
KINDS: Final = ("nf4", "fp4")
ROW_MAJOR: Final = 0
"""Value of ``weight_format`` that is not a layout of some GPU."""
INT8_STEP: Final = 7.874015718698502e-3
"""1 / 127, as the library has it."""


def four_bit(tensors: ModuleTensors, form: StoredForm) -> Unpacker:
    """Return what unpacks ``NAME.weight`` in NF4 or FP4: a table's entry for each code, times the largest number of its block.

    Raises:
        BaseModelError: If a tensor is missing or does not fit.
    """
    outputs, inputs = tensors.shape
    state = _State.read(tensors)
    stored = tensors.take(MARK, (math.ceil(outputs * inputs / 2), 1), (torch.uint8,))
    table = _finite(tensors, "weight.quant_map", CODES)
    largest = _largest(tensors, state)

    def numbers(first: int, last: int) -> Tensor:
        begin, end = first * inputs, last * inputs
        pairs = stored[begin // 2 : math.ceil(end / 2)].to(tensors.device)
        codes = torch.cat((pairs >> 4, pairs & 15), dim=1).flatten()[begin % 2 :][: end - begin]
        block = torch.arange(begin, end, device=tensors.device) // state.block
        values: Tensor = table[codes.int()] * largest[block]
        return values.view(last - first, inputs)

    return _scaled(tensors, numbers, 1.0)


def int8(tensors: ModuleTensors, form: StoredForm) -> Unpacker:
    """Return what unpacks ``NAME.weight`` in INT8: times the largest number of its row, ``NAME.SCB``, over 127.

    Raises:
        BaseModelError: If a tensor is missing or does not fit.
    """
    stored = tensors.take(MARK, tensors.shape, (torch.int8,))
    largest = _finite(tensors, "SCB", tensors.shape[0])
    if tensors.has("weight_format"):
        layout = int(tensors.take("weight_format", (), (torch.uint8,))[...])
        if layout != ROW_MAJOR:
            raise BaseModelError(
                f"{tensors.name}.weight_format is {layout}, a layout of some GPU; save the model again with bitsandbytes "
                "0.45 or newer"
            )

    def numbers(first: int, last: int) -> Tensor:
        values: Tensor = stored[first:last].to(tensors.device, torch.float32) * largest[first:last, None]
        return values

    return _scaled(tensors, numbers, INT8_STEP)


def _scaled(tensors: ModuleTensors, numbers: Any, scale: float) -> Unpacker:
    return Unpacker(
        numbers=numbers,
        scales=torch.full((1, 1), scale, device=tensors.device),
        zeros=None,
        outputs_per_scale=tensors.shape[0],
        group_of_input=torch.zeros(tensors.shape[1], dtype=torch.int64, device=tensors.device),
    )


class _State:
    """What ``quant_state`` says of a weight.

    Attributes:
        block: Numbers of the flattened weight that share a scale.
        nested_block: Scales that share a scale of their own; None if they are stored whole.
        offset: What is added to such a scale.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.block = int(values["blocksize"])
        self.nested_block = int(values["nested_blocksize"]) if "nested_blocksize" in values else None
        self.offset = float(values.get("nested_offset", 0.0))
        self.shape = [int(each) for each in values["shape"]]
        if self.block <= 0 or (self.nested_block is not None and self.nested_block <= 0):
            raise ValueError("a block without numbers")
        if not math.isfinite(self.offset):
            raise ValueError("nested_offset is no number")

    @classmethod
    def read(cls, tensors: ModuleTensors) -> _State:
        """Read it.

        Raises:
            BaseModelError: If it is missing, is none, or is of another shape.
        """
        suffixes = [f"weight.quant_state.bitsandbytes__{kind}" for kind in KINDS]
        suffix = next((each for each in suffixes if tensors.has(each)), suffixes[0])
        name, stored = f"{tensors.name}.{suffix}", tensors.take(suffix, None, (torch.uint8,))
        try:
            state = cls(json.loads(bytes(stored[:].tolist())))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise BaseModelError(f"{name}: unreadable: {error!r}; fetch the weights again") from error
        if state.shape != [*tensors.shape]:
            raise BaseModelError(f"{name} has shape {state.shape}, config.json implies {[*tensors.shape]}")
        return state


def _finite(tensors: ModuleTensors, suffix: str, num: int) -> Tensor:
    """Return a table or scales, fp32 ``[num]``, on the device.

    Raises:
        BaseModelError: If it is missing or does not fit, or a value is NaN or infinite.
    """
    values: Tensor = tensors.take(suffix, (num,), (torch.float32,))[:]
    refuse_infinite(f"{tensors.name}.{suffix}", values)
    return values.to(tensors.device)


def _largest(tensors: ModuleTensors, state: _State) -> Tensor:
    """Return the largest number of each block, fp32 ``[blocks]``: stored whole, or as codes of a second table."""
    num_blocks = math.ceil(math.prod(tensors.shape) / state.block)
    if state.nested_block is None:
        return _finite(tensors, "weight.absmax", num_blocks)
    codes = tensors.take("weight.absmax", (num_blocks,), (torch.uint8,))[:].to(tensors.device)
    table = _finite(tensors, "weight.nested_quant_map", NESTED_CODES)
    nested = _finite(tensors, "weight.nested_absmax", math.ceil(num_blocks / state.nested_block))
    of_block = torch.arange(num_blocks, device=tensors.device) // state.nested_block
    largest: Tensor = table[codes.int()] * nested[of_block] + state.offset
    return largest
