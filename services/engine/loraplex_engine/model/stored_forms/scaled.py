"""Numbers that torch has a type of, in the shape of the weight: FP8 (e4m3) and INT8."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loraplex_engine.model.stored_forms.unpacker import Unpacker, groups_of_inputs, read_scales, scale_grid

if TYPE_CHECKING:
    from loraplex_common.stored_forms.quantisation import StoredForm
    from torch import Tensor

    from loraplex_engine.model.stored_forms.unpacker import ModuleTensors

MARK = "weight"


def float8(tensors: ModuleTensors, form: StoredForm) -> Unpacker:
    """Return what unpacks ``NAME.weight`` in e4m3.

    Raises:
        BaseModelError: If a tensor is missing or does not fit.
    """
    return _scaled(tensors, form, torch.float8_e4m3fn)


def int8(tensors: ModuleTensors, form: StoredForm) -> Unpacker:
    """Return what unpacks ``NAME.weight`` in int8; ``NAME.weight_zero_point`` has the shape of the scales.

    Raises:
        BaseModelError: If a tensor is missing or does not fit.
    """
    return _scaled(tensors, form, torch.int8)


def _scaled(tensors: ModuleTensors, form: StoredForm, dtype: torch.dtype) -> Unpacker:
    stored = tensors.take(MARK, tensors.shape, (dtype,))
    grid = scale_grid(form, tensors.shape)
    zeros: Tensor | None = None
    if form.has_zero_points:
        zeros = tensors.take("weight_zero_point", grid, (torch.int8,))[:].to(tensors.device, torch.float32)
    return Unpacker(
        numbers=lambda first, last: stored[first:last],
        scales=read_scales(tensors, form, grid),
        zeros=zeros,
        outputs_per_scale=form.block[0] or tensors.shape[0],
        group_of_input=groups_of_inputs(tensors, form, "weight_g_idx", grid[1]),
    )
