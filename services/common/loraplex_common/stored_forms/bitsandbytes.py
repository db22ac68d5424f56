"""``bitsandbytes``: NF4 and FP4, in which QLoRA trains, and the INT8 of LLM.int8().

Source: transformers' ``BitsAndBytesConfig``; bitsandbytes' ``QuantState`` and ``Int8Params``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.stored_forms.quantisation import (
    SERVE_INSTEAD,
    Patterns,
    Quantisation,
    StoredForm,
    every_linear,
    refuse_unknown,
    refuse_unless,
)

if TYPE_CHECKING:
    from loraplex_common.config_values import ConfigValues

HARMLESS: Final = (
    *("bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload"),
)
"""Keys that say how to multiply by the numbers, or what the files say once more."""
KNOWN: Final = (
    *("quant_method", "load_in_4bit", "_load_in_4bit", "load_in_8bit", "_load_in_8bit", "bnb_4bit_quant_type"),
    *("bnb_4bit_quant_storage", "llm_int8_skip_modules", "llm_int8_has_fp16_weight", *HARMLESS),
)


def read(values: ConfigValues) -> Quantisation:
    """Read ``quantization_config``; how blocks and their scales lie is said by each weight's ``quant_state`` in the files.

    Raises:
        BaseModelError: If it asks for something that is not served; the message names the key.
    """
    refuse_unknown(values, KNOWN)
    refuse_unless(values, "bnb_4bit_quant_type", ("nf4", "fp4"))
    refuse_unless(values, "bnb_4bit_quant_storage", ("uint8",))
    refuse_unless(values, "llm_int8_has_fp16_weight", (False,))
    bits = [
        bits for bits in (4, 8) if any(_is_set(values, key) for key in (f"load_in_{bits}bit", f"_load_in_{bits}bit"))
    ]
    if len(bits) != 1:
        raise values.problem(
            f"quantization_config sets {'both' if bits else 'neither'} of load_in_4bit and load_in_8bit; {SERVE_INSTEAD}"
        )
    is_int8 = bits == [8]
    form = StoredForm(name="bnb_int8" if is_int8 else "bnb_4bit", bits=bits[0])
    skipped = Patterns.read(values, "llm_int8_skip_modules", parts_match=True)
    return Quantisation("bitsandbytes", every_linear(form), skipped, quantises_activations=is_int8)


def _is_set(values: ConfigValues, key: str) -> bool:
    return values.has(key) and values.flag(key)
