"""AWQ: numbers and zeros packed along the outputs in an interleaved order, transposed to ``[inputs, outputs]``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from loraplex_engine.model.stored_forms.unpacker import Unpacker, read_scales, scale_grid, unpack_words

if TYPE_CHECKING:
    from loraplex_common.stored_forms.quantisation import StoredForm
    from torch import Tensor

    from loraplex_engine.model.stored_forms.unpacker import ModuleTensors

MARK = "qweight"
ORDER: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of its eight outputs lies."""


def unpacker(tensors: ModuleTensors, form: StoredForm) -> Unpacker:
    """Return what unpacks ``NAME.qweight``.

    Raises:
        BaseModelError: If a tensor is missing or does not fit.
    """
    outputs, inputs = tensors.shape
    per_word, (_, groups) = 32 // form.bits, scale_grid(form, tensors.shape)
    stored = tensors.take(MARK, (inputs, outputs // per_word), (torch.int32,))
    words: Tensor = tensors.take("qzeros", (groups, outputs // per_word), (torch.int32,))[:].to(tensors.device)

    def numbers(first: int, last: int) -> Tensor:
        begin = first // per_word
        part: Tensor = stored[:, begin : -(-last // per_word)].to(tensors.device)
        found = unpack_words(part, form.bits, ORDER).flatten(1)  # [inputs, outputs of the words]
        return found[:, first - begin * per_word : last - begin * per_word].t()

    return Unpacker(
        numbers=numbers,
        scales=read_scales(tensors, form, (groups, outputs)).t(),
        zeros=unpack_words(words, form.bits, ORDER).flatten(1).float().t(),
        outputs_per_scale=1,
        group_of_input=torch.arange(inputs, device=tensors.device) // (form.block[1] or inputs),
    )
