"""``fp8``: numbers in e4m3 with one scale for a tensor or for a block of it, as transformers and Mistral write them.

Source: transformers' ``FineGrainedFP8Config``; DeepSeek-V3's model card (``weight_scale_inv`` is what numbers are
multiplied by); AutoFP8 for ``weight_scale``.
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

IGNORED: Final = ("modules_to_not_convert", "ignored_layers")
DEFAULT_BLOCK: Final = (128, 128)
"""As transformers has it; AutoFP8 leaves the key out and stores one scale for a tensor, which needs no key to be told."""
KNOWN: Final = (
    *("quant_method", "activation_scheme", "weight_block_size", "scale_fmt", "fmt", "modules_to_convert"),
    *IGNORED,
    *("dequantize", "expert_dtype", "kv_cache_scheme", "is_checkpoint_fp8_serialized"),
)


def read(values: ConfigValues) -> Quantisation:
    """Read ``quantization_config``; null as ``weight_block_size`` is one scale for a tensor.

    Raises:
        BaseModelError: If it asks for something that is not served; the message names the key.
    """
    refuse_unknown(values, KNOWN)
    refuse_unless(values, "activation_scheme", ("dynamic", "static"))
    refuse_unless(values, "scale_fmt", ("float",))
    refuse_unless(values, "fmt", ("e4m3",))
    refuse_unless(values, "modules_to_convert", ([],))
    ignored = [Patterns.read(values, key, parts_match=True).patterns for key in IGNORED]
    absent = DEFAULT_BLOCK if values.is_absent("weight_block_size") else (None, None)
    block = values.pair("weight_block_size") or absent
    form = StoredForm(name="scaled_float8", bits=8, block=block, scales=("weight_scale_inv", "weight_scale"))
    patterns = Patterns((*ignored[0], *ignored[1]), parts_match=True)
    return Quantisation("fp8", every_linear(form), patterns, quantises_activations=True)
