"""``gptq``: 4 or 8 bits, packed along the inputs, one scale and zero for a group of inputs.

Source: AutoGPTQ's and GPTQModel's ``QuantizeConfig`` and ``QuantLinear``. Checkpoints of format ``gptq`` store zero minus
one, those of ``gptq_v2`` zero itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.stored_forms.quantisation import (
    Quantisation,
    StoredForm,
    every_linear,
    refuse_unknown,
    refuse_unless,
)

if TYPE_CHECKING:
    from loraplex_common.config_values import ConfigValues

HARMLESS: Final = (
    *("damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "sym", "mse", "dataset", "tokenizer"),
    *("model_name_or_path", "model_file_base_name", "quantizer", "meta", "cache_block_outputs", "batch_size"),
    *("pad_token_id", "use_cuda_fp16", "model_seqlen", "block_name_to_quantize", "max_input_length", "backend"),
    *("module_name_preceding_first_block", "modules_in_block_to_quantize", "use_exllama", "disable_exllama"),
    *("exllama_config", "group_aware", "act_group_aware", "offload_to_disk", "offload_to_disk_path", "pack_impl"),
)
"""Keys that say how the numbers were found, or which program multiplies by them."""
KNOWN: Final = (
    *("quant_method", "bits", "group_size", "desc_act", "checkpoint_format", "format", "is_marlin_format", "lm_head"),
    *("dynamic", "pack_dtype", *HARMLESS),
)


def read(values: ConfigValues) -> Quantisation:
    """Read ``quantization_config``.

    Raises:
        BaseModelError: If it asks for something that is not served; the message names the key.
    """
    refuse_unknown(values, KNOWN)
    refuse_unless(values, "bits", (4, 8))
    refuse_unless(values, "is_marlin_format", (False,))
    refuse_unless(values, "lm_head", (False,))
    refuse_unless(values, "dynamic", ({},))
    refuse_unless(values, "pack_dtype", ("int32",))
    for key in ("checkpoint_format", "format"):
        refuse_unless(values, key, ("gptq", "gptq_v2"))
    version = _version(values)
    form = StoredForm(
        name="gptq",
        bits=values.integer("bits"),
        block=(1, values.group_size()),
        has_zero_points=True,
        is_reordered=values.flag("desc_act"),
        scales=("scales",),
        zero_offset=0 if version == "gptq_v2" else 1,
    )
    return Quantisation("gptq", every_linear(form))


def _version(values: ConfigValues) -> str:
    """Return the format; programs write it under one key or the other, or under both."""
    found = {key: values.text(key, "gptq") for key in ("checkpoint_format", "format") if values.has(key)}
    if len(set(found.values())) > 1:
        raise values.wrong("format", f"expected that of checkpoint_format, {found['checkpoint_format']!r}")
    return next(iter(found.values()), "gptq")
