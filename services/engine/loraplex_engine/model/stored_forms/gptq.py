"""GPTQ: numbers packed along the inputs, zeros along the outputs, both transposed to ``[inputs, outputs]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

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

MARK = "qweight"


def unpacker(tensors: ModuleTensors, form: StoredForm) -> Unpacker:
    """Return what unpacks ``NAME.qweight``.

    A stored zero is one less, modulo the range, where the form's ``zero_offset`` is 1: programs that write 0 as -1 store all
    bits set.

    Raises:
        BaseModelError: If a tensor is missing or does not fit.
    """
    outputs, inputs = tensors.shape
    per_word, (_, groups) = 32 // form.bits, scale_grid(form, tensors.shape)
    stored = tensors.take(MARK, (inputs // per_word, outputs), (torch.int32,))
    words: Tensor = tensors.take("qzeros", (groups, outputs // per_word), (torch.int32,))[:].to(tensors.device)
    zeros = (unpack_words(words, form.bits).flatten(1) + form.zero_offset) & ((1 << form.bits) - 1)

    def numbers(first: int, last: int) -> Tensor:
        part: Tensor = stored[:, first:last].to(tensors.device)  # [inputs / per_word, rows]
        return unpack_words(part.t(), form.bits).flatten(1)

    return Unpacker(
        numbers=numbers,
        scales=read_scales(tensors, form, (groups, outputs)).t(),
        zeros=zeros.float().t(),
        outputs_per_scale=1,
        group_of_input=groups_of_inputs(tensors, form, "g_idx", groups),
    )
