"""``awq``: 4 bits, packed along the outputs in an interleaved order, one scale and zero for a group of inputs.

Source: AutoAWQ's ``WQLinear_GEMM``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.stored_forms.quantisation import (
    Patterns,
    Quantisation,
    StoredForm,
    every_linear,
    refuse_unknown,
    refuse_unless,
)

if TYPE_CHECKING:
    from loraplex_common.config_values import ConfigValues

HARMLESS: Final = ("do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "backend")
"""Keys that say which program multiplies by the numbers."""
KNOWN: Final = (
    *("quant_method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "modules_to_not_convert"),
    *HARMLESS,
)


def read(values: ConfigValues) -> Quantisation:
    """Read ``quantization_config``.

    Raises:
        BaseModelError: If it asks for something that is not served; the message names the key.
    """
    refuse_unknown(values, KNOWN)
    refuse_unless(values, "zero_point", (True,))
    refuse_unless(values, "version", ("gemm", "GEMM"))
    bits = "w_bit" if values.has("w_bit") else "bits"
    refuse_unless(values, bits, (4,))
    size = values.group_size("q_group_size" if values.has("q_group_size") else "group_size")
    form = StoredForm(name="awq", bits=values.integer(bits), block=(1, size), has_zero_points=True, scales=("scales",))
    return Quantisation("awq", every_linear(form), Patterns.read(values, "modules_to_not_convert", parts_match=True))
