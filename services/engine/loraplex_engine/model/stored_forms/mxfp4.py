"""MXFP4: e2m1 numbers, two a byte, the lower four bits first, and a power of two for 32 inputs.

Source: OCP Microscaling Formats (MX) 1.0; compressed-tensors' ``MXFP4PackedCompressor``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from loraplex_common.base_model import BaseModelError

from loraplex_engine.model.stored_forms.unpacker import Unpacker, scale_grid

if TYPE_CHECKING:
    from loraplex_common.stored_forms.quantisation import StoredForm
    from torch import Tensor

    from loraplex_engine.model.stored_forms.unpacker import ModuleTensors

MARK = "weight_packed"
E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by their code; the fourth bit is the sign."""
BIAS: Final = 127
NO_NUMBER: Final = 255
"""Code of a scale that is no number."""


def unpacker(tensors: ModuleTensors, form: StoredForm) -> Unpacker:
    """Return what unpacks ``NAME.weight_packed``.

    Raises:
        BaseModelError: If a tensor is missing or does not fit, or a scale is no number.
    """
    outputs, inputs = tensors.shape
    stored = tensors.take(MARK, (outputs, inputs // 2), (torch.uint8,))
    exponents: Tensor = tensors.take("weight_scale", scale_grid(form, tensors.shape), (torch.uint8,))[:]
    if bool((exponents == NO_NUMBER).any()):
        raise BaseModelError(f"{tensors.name}.weight_scale holds NaN; fetch the weights again")
    shifts = exponents.to(tensors.device).int() - BIAS
    table = torch.tensor((*E2M1, *(-each for each in E2M1)), device=tensors.device)

    def numbers(first: int, last: int) -> Tensor:
        pairs: Tensor = stored[first:last].to(tensors.device)
        return table[torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1).int()]

    return Unpacker(
        numbers=numbers,
        scales=torch.ldexp(torch.ones(exponents.shape, device=tensors.device), shifts),
        zeros=None,
        outputs_per_scale=1,
        group_of_input=torch.arange(inputs, device=tensors.device) // (form.block[1] or inputs),
    )
