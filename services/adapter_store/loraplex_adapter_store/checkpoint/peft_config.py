"""adapter_config.json: which settings matter, which are harmless, and which are refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Final

from loraplex_common.adapter_folder import CONFIG_FILE as FILE
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError

from loraplex_adapter_store.checkpoint.bounds import MAX_CONFIG_BYTES, MAX_CONFIG_VALUES, MAX_RANK, parse_json

_USED: Final = frozenset(
    {
        *("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
        *("exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path", "bias"),
        "init_lora_weights",
        "target_parameters",  # the dialects turn it into target_modules, or refuse it
    }
)
_HARMLESS: Final = frozenset(
    {
        # These concern training, or how the file was made; they do not change the inference.
        *("auto_mapping", "revision", "inference_mode", "lora_dropout", "peft_version", "runtime_config"),
        *("eva_config", "corda_config", "loftq_config", "lora_ga_config"),  # initialisation; see init_lora_weights
        *("megatron_core", "qalora_group_size"),  # act only together with megatron_config and use_qalora
        "fan_in_fan_out",  # off in PEFT for layers that store weights as all served architectures do
        "tensor_model_parallel_size",  # says how Megatron wrote fused tensors; see the dialects
        "ensure_weight_tying",  # acts only on embeddings, which are refused anyway
    }
)
_REFUSED: Final = {
    "use_dora": "DoRA's magnitude vectors are not served",
    "lora_bias": "biases of LoRA matrices are not served",
    "modules_to_save": "fully trained modules are not served; train with LoRA on the projections only",
    "trainable_token_indices": "trained token embeddings are not served",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not served",
    "megatron_config": "Megatron layers are not served",
    "layer_replication": "it changes the base model's layers",
    "use_qalora": "QALoRA is not served",
    "use_bdlora": "block-diagonal LoRA is not served",
    "velora_config": "VeLoRA is not served",
    "monteclora_config": "MonteCLoRA is not served",
    "arrow_config": "Arrow routing is not served",
    "kasa_config": "KaSA is not served",
}
# These values start from the unchanged base and leave plain LoRA (MiCA trains A alone). All other strings (pissa,
# olora, corda, loftq, ...) change the base weights too, and such a checkpoint is only right on top of the changed
# weights.
_HARMLESS_INITS: Final = frozenset({"gaussian", "eva", "orthogonal", "mica"})


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftConfig:
    """The settings of a LoRA checkpoint that decide what it computes.

    Attributes:
        target_modules: Names, one regular expression, or ``all-linear``.
        layers_to_transform: Layers that named targets are limited to; None for all.
        layers_pattern: Names of the lists of layers that the indices refer to; empty for any list.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    base_model_name_or_path: str

    def scaling(self, rank: int, alpha: float) -> float:
        """Return the factor on B A x: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732)."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parse_peft_config(data: bytes) -> PeftConfig:
    """Read adapter_config.json.

    Raises:
        AdapterCorruptUploadError: If it is not a JSON object or a setting has the wrong type.
        AdapterIncompatibleError: If a setting asks for something that is not served; the message names the setting.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterCorruptUploadError(f"{FILE}: {len(data)} bytes, at most {MAX_CONFIG_BYTES} are read")
    fields = parse_json(data, what=FILE, max_values=MAX_CONFIG_VALUES)
    if not isinstance(fields, dict):
        raise AdapterCorruptUploadError(f"{FILE}: no JSON object")
    _refuse_unserved(fields)
    base_name = fields.get("base_model_name_or_path")
    if not isinstance(base_name, str | None):
        raise _wrong("base_model_name_or_path", base_name, "a string")
    return PeftConfig(
        rank=_rank("r", fields.get("r", 8)),
        alpha=_number("lora_alpha", fields.get("lora_alpha", 8)),
        use_rslora=_flag("use_rslora", fields.get("use_rslora")),
        rank_pattern={k: _rank(f"rank_pattern[{k!r}]", v) for k, v in _mapping(fields, "rank_pattern").items()},
        alpha_pattern={k: _number(f"alpha_pattern[{k!r}]", v) for k, v in _mapping(fields, "alpha_pattern").items()},
        target_modules=_names(fields, "target_modules"),
        exclude_modules=_names(fields, "exclude_modules"),
        layers_to_transform=_layers(fields.get("layers_to_transform")),
        layers_pattern=_as_tuple(_names(fields, "layers_pattern")),
        base_model_name_or_path=base_name or "",
    )


def _refuse_unserved(fields: dict[str, Any]) -> None:
    peft_type = fields.get("peft_type")
    if peft_type is None:
        raise AdapterIncompatibleError(f'{FILE}: peft_type is missing: PEFT writes "LORA" for LoRA')
    if peft_type != "LORA":
        raise AdapterIncompatibleError(f"{FILE}: peft_type {_shown(peft_type)} is not served, only LORA")
    for name, why in _REFUSED.items():
        if not _is_off(fields.get(name)):
            raise AdapterIncompatibleError(f"{FILE}: {name} = {_shown(fields[name])}: {why}")
    for name in ("bias", "task_type"):
        if not isinstance(fields.get(name), str | None):
            raise _wrong(name, fields[name], "a string")
    if fields.get("bias") not in ("none", None):
        raise AdapterIncompatibleError(f"{FILE}: bias = {_shown(fields['bias'])}: trained biases are not served")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterIncompatibleError(f"{FILE}: task_type = {_shown(fields['task_type'])}: only CAUSAL_LM is served")
    init = fields.get("init_lora_weights")
    if not isinstance(init, str | bool | None):
        raise _wrong("init_lora_weights", init, "true, false or a string")
    if isinstance(init, str) and init.lower() not in _HARMLESS_INITS:
        raise AdapterIncompatibleError(
            f"{FILE}: init_lora_weights = {_shown(init)} changes the base weights; convert the checkpoint to plain LoRA "
            "(PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for name, value in fields.items():
        if value and name not in _USED | _HARMLESS:
            raise AdapterIncompatibleError(
                f"{FILE}: unknown setting {name[:100]} = {_shown(value)}: it may change what the adapter computes"
            )


def _is_off(value: Any) -> bool:
    # An empty object is not off: PEFT makes it a variant's config, with that variant's defaults.
    return value is None or value is False or value == []


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        return "a value nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."


def _wrong(name: str, value: Any, expected: str) -> AdapterCorruptUploadError:
    return AdapterCorruptUploadError(f"{FILE}: {name} = {_shown(value)} is not {expected}")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | None):
        raise _wrong(name, value, "true or false")
    return bool(value)


def _rank(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_RANK:
        raise _wrong(name, value, f"a rank from 1 to {MAX_RANK}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise _wrong(name, value, "a finite number")
    return float(value)


def _mapping(fields: dict[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name)
    if not isinstance(value, dict | None):
        raise _wrong(name, value, "an object")
    return value or {}


def _names(fields: dict[str, Any], name: str) -> str | tuple[str, ...]:
    value = fields.get(name)
    if isinstance(value, str | None):
        return value or ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _wrong(name, value, "a string or a list of strings")
    return tuple(value)


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _layers(value: Any) -> frozenset[int] | None:
    layers = [value] if isinstance(value, int) else value
    if layers is None or layers == []:  # PEFT: an empty list limits nothing
        return None
    if not isinstance(layers, list) or not all(isinstance(x, int) and not isinstance(x, bool) for x in layers):
        raise _wrong("layers_to_transform", value, "a layer or a list of layers")
    return frozenset(layers)
