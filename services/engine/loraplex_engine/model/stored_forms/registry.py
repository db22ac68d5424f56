"""Stored form -> what unpacks it. A new form is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from loraplex_engine.model.stored_forms import awq, bitsandbytes, gptq, mxfp4, packed_int32, scaled

if TYPE_CHECKING:
    from loraplex_common.stored_forms.quantisation import StoredForm

    from loraplex_engine.model.stored_forms.unpacker import ModuleTensors, Unpacker

MakeUnpacker: TypeAlias = Callable[["ModuleTensors", "StoredForm"], "Unpacker"]
"""Finds a layer's tensors; raises `BaseModelError` if one is missing or does not fit."""


@dataclass(frozen=True, slots=True)
class FormReader:
    """What reads one stored form.

    Attributes:
        mark: The tensor that holds the numbers: ``NAME.mark``.
    """

    mark: str
    make: MakeUnpacker


FORM_READERS: Final[dict[str, FormReader]] = {
    "scaled_float8": FormReader(scaled.MARK, scaled.float8),
    "scaled_int8": FormReader(scaled.MARK, scaled.int8),
    "packed_int32": FormReader(packed_int32.MARK, packed_int32.unpacker),
    "gptq": FormReader(gptq.MARK, gptq.unpacker),
    "awq": FormReader(awq.MARK, awq.unpacker),
    "bnb_4bit": FormReader(bitsandbytes.MARK, bitsandbytes.four_bit),
    "bnb_int8": FormReader(bitsandbytes.MARK, bitsandbytes.int8),
    "mxfp4": FormReader(mxfp4.MARK, mxfp4.unpacker),
}
"""By `StoredForm.name`."""
UNUSED_SUFFIXES: Final = (
    *(".input_scale", ".input_zero_point", ".activation_scale", ".output_scale", ".output_zero_point"),
    *(".k_scale", ".v_scale", ".q_scale", ".kv_scale"),
)
"""Tensors of a quantised checkpoint that say how to quantise activations, keys and values, which stay whole here."""
