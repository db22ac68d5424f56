"""``compressed-tensors``: what llm-compressor writes; groups of modules, each with a scheme of its own.

Source: the library compressed-tensors, ``QuantizationConfig``, ``QuantizationArgs`` and its compressors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.stored_forms.quantisation import (
    SERVE_INSTEAD,
    Group,
    Patterns,
    Quantisation,
    StoredForm,
    refuse_unknown,
    refuse_unless,
)

if TYPE_CHECKING:
    from loraplex_common.config_values import ConfigValues

KNOWN: Final = (
    *("quant_method", "config_groups", "format", "ignore", "quantization_status", "kv_cache_scheme", "version"),
    *("global_compression_ratio", "sparsity_config", "transform_config", "run_compressed", "moe_sparsity_config"),
)
GROUP_KNOWN: Final = ("targets", "weights", "input_activations", "output_activations", "format")
WEIGHTS_KNOWN: Final = (
    *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"),
    *("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
)
FORMS: Final = {
    ("float-quantized", "float"): "scaled_float8",
    ("naive-quantized", "float"): "scaled_float8",
    ("int-quantized", "int"): "scaled_int8",
    ("naive-quantized", "int"): "scaled_int8",
    ("pack-quantized", "int"): "packed_int32",
    ("mxfp4-pack-quantized", "float"): "mxfp4",
}
"""By format and type of number."""
BITS: Final = {"packed_int32": (4, 8), "mxfp4": (4,)}
"""By form; of the others 8."""
MX_GROUP: Final = 32
REORDERING: Final = ("group", True)
"""Values of ``actorder`` with which inputs may belong to groups out of order."""


def read(values: ConfigValues) -> Quantisation:
    """Read ``quantization_config``.

    Raises:
        BaseModelError: If it asks for something that is not served; the message names the key.
    """
    refuse_unknown(values, KNOWN)
    refuse_unless(values, "quantization_status", ("compressed", "frozen"))
    for key in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        refuse_unless(values, key, ({}, {"format": "dense"}))
    if (groups := values.section("config_groups")) is None:
        raise values.wrong("config_groups", "expected an object of groups")
    sections = [_section(groups, name) for name in groups.names()]
    read_groups = tuple(_group(section, values.text("format", "")) for section in sections)
    return Quantisation(
        "compressed-tensors",
        read_groups,
        Patterns.read(values, "ignore"),
        any(section.has(key) for section in sections for key in ("input_activations", "output_activations")),
    )


def _section(groups: ConfigValues, name: str) -> ConfigValues:
    if (group := groups.section(name)) is None:
        raise groups.wrong(name, "expected an object")
    return group


def _group(group: ConfigValues, default_format: str) -> Group:
    refuse_unknown(group, GROUP_KNOWN)
    weights = group.section("weights")
    if weights is None:
        raise group.unserved("weights", "a group whose weights are whole", SERVE_INSTEAD)
    refuse_unknown(weights, WEIGHTS_KNOWN)
    stored_as = group.text("format", default_format) if group.has("format") else default_format
    number = weights.text("type", "int")
    if (stored_as, number) not in FORMS:
        served = ", ".join(sorted({each for each, _ in FORMS}))
        raise group.problem(
            f"quantization_config.format {stored_as!r} of {number} weights is not served; served: {served}; {SERVE_INSTEAD}"
        )
    name = FORMS[stored_as, number]
    refuse_unless(weights, "num_bits", BITS.get(name, (8,)))
    refuse_unless(weights, "dynamic", (False,))
    symmetric = weights.flag("symmetric", default=True)
    if number == "float" and not symmetric:
        raise weights.unserved("symmetric", "floating-point numbers have no zero points", SERVE_INSTEAD)
    block = _block(weights)
    if name == "mxfp4" and block != (1, MX_GROUP):
        raise weights.unserved("group_size", f"MXFP4 has a scale for {MX_GROUP} inputs", SERVE_INSTEAD)
    form = StoredForm(
        name=name,
        bits=weights.integer("num_bits", 8),
        block=block,
        has_zero_points=not symmetric,
        is_reordered=_is_reordered(weights),
    )
    return Group(Patterns.read(group, "targets"), form)


def _is_reordered(weights: ConfigValues) -> bool:
    refuse_unless(weights, "actorder", ("group", "weight", "static", "dynamic", True, False))
    return weights.has("actorder") and weights.raw("actorder") in (*REORDERING, "dynamic")


def _block(weights: ConfigValues) -> tuple[int | None, int | None]:
    """Return outputs and inputs of a scale; without a strategy, as the library infers it from the group's size."""
    strategy = weights.text("strategy", "tensor") if weights.has("strategy") else _strategy_of_size(weights)
    if strategy == "group":
        return 1, weights.integer("group_size")
    if strategy == "channel":
        return 1, None
    if strategy == "tensor":
        return None, None
    if strategy == "block" and (block := weights.pair("block_structure")):
        return block
    raise weights.unserved("strategy", "served: tensor, channel, group, block with block_structure", SERVE_INSTEAD)


def _strategy_of_size(weights: ConfigValues) -> str:
    if not weights.has("group_size"):
        return "tensor"
    return "channel" if weights.raw("group_size") == -1 else "group"
