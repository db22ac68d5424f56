"""compressed-tensors' ``pack-quantized``: signed numbers plus half their range, packed along the inputs into int32."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from loraplex_common.base_model import BaseModelError

from loraplex_engine.model.stored_forms.unpacker import (
    Unpacker,
    groups_of_inputs,
    read_scales,
    scale_grid,
    unpack_words,
)

if TYPE_CHECKING:
    from loraplex_common.stored_forms.quantisation import StoredForm
    from torch import Tensor

    from loraplex_engine.model.stored_forms.unpacker import ModuleTensors

MARK = "weight_packed"


def unpacker(tensors: ModuleTensors, form: StoredForm) -> Unpacker:
    """Return what unpacks ``NAME.weight_packed``; zeros are packed along the outputs.

    Raises:
        BaseModelError: If a tensor is missing or does not fit.
    """
    outputs, inputs = tensors.shape
    per_word = 32 // form.bits
    stored = tensors.take(MARK, (outputs, math.ceil(inputs / per_word)), (torch.int32,))
    shape = tensors.take("weight_shape", (2,), (torch.int64, torch.int32))[:].tolist()
    if shape != [outputs, inputs]:
        raise BaseModelError(f"{tensors.name}.weight_shape is {shape}, config.json implies {[outputs, inputs]}")
    grid = scale_grid(form, tensors.shape)

    def numbers(first: int, last: int) -> Tensor:
        words = stored[first:last].to(tensors.device)
        return unpack_words(words, form.bits).flatten(1)[:, :inputs]

    half = float(1 << (form.bits - 1))
    return Unpacker(
        numbers=numbers,
        scales=read_scales(tensors, form, grid),
        zeros=_zeros(tensors, form, grid) if form.has_zero_points else torch.full(grid, half, device=tensors.device),
        outputs_per_scale=form.block[0] or outputs,
        group_of_input=groups_of_inputs(tensors, form, "weight_g_idx", grid[1]),
    )


def _zeros(tensors: ModuleTensors, form: StoredForm, grid: tuple[int, int]) -> Tensor:
    """Return the zeros with half the range added, as the numbers have it, ``grid``."""
    packed_shape = (math.ceil(grid[0] * form.bits / 32), grid[1])
    words: Tensor = tensors.take("weight_zero_point", packed_shape, (torch.int32,))[:].to(tensors.device)
    return unpack_words(words.t(), form.bits).flatten(1)[:, : grid[0]].t().float()
