"""adapter_config.json: which settings matter, which are harmless, and which are refused by name."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Final

from loraplex_common.adapter_folder import CONFIG_FILE as FILE
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError
from loraplex_common.request_limits import MAX_INT32
from loraplex_common.text_parts import MAX_INVOCATION_TOKENS

from loraplex_adapter_store.checkpoint.bounds import MAX_CONFIG_BYTES, MAX_CONFIG_VALUES, MAX_RANK, parse_json
from loraplex_adapter_store.checkpoint.outside_config import OutsideConfig, read_outside
from loraplex_adapter_store.checkpoint.peft_methods import (
    ADALORA,
    LORA,
    METHODS,
    REFUSED_METHODS,
    SHIRA,
    VERA,
    Method,
)

# These values start from the unchanged base and leave plain LoRA (MiCA trains A alone). All other strings (pissa,
# olora, corda, loftq, ...) change the base weights too, and such a checkpoint is only right on top of the changed
# weights.
_HARMLESS_INITS: Final = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_DEFAULT_RANK: Final = {LORA: 8, ADALORA: 12, VERA: 256, SHIRA: 32}
_ADALORA_KEY: Final = re.compile(r"(?P<module>\w+(?:\.\w+)*)\.lora_E(?:\.\w+)?", re.ASCII)
_MISSING_NAMES: Final = {"feedforward_modules": "PEFT writes which of target_modules scale their inputs, [] for none"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftConfig:
    """The settings of a checkpoint that decide what it computes.

    Attributes:
        method: ``peft_type``: one of `METHODS`.
        rank: Rank of modules that neither ``rank_pattern`` nor ``ranks`` names.
        ranks: Ranks that AdaLoRA's budget left to modules, by their dotted names.
        bias: ``none``, ``all`` or ``only`` (of adapted modules): which of the base's biases were trained.
        target_modules: Names, one regular expression, or ``all-linear``.
        feedforward_modules: Likewise, the modules whose inputs (IA)3 scales.
        layers_to_transform: Layers that named targets are limited to; None for all.
        invocation_token_ids: The sequence that the adapter applies from (activated LoRA); empty: it applies to all tokens.
        layers_pattern: Names of the lists of layers that the indices refer to; empty for any list.
        outside: What it does to the embedding and lm_head besides LoRA.
    """

    method: str = LORA
    rank: int
    alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    feedforward_modules: str | tuple[str, ...] = ()
    layers_to_transform: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()
    base_model_name_or_path: str = ""
    invocation_token_ids: tuple[int, ...] = ()
    outside: OutsideConfig = field(default_factory=OutsideConfig)

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
    name = _method(fields)
    _refuse_unserved(fields, METHODS[name])
    base_name = fields.get("base_model_name_or_path")
    if not isinstance(base_name, str | None):
        raise _wrong("base_model_name_or_path", base_name, "a string")
    patterns: dict[str, Any] = {}
    if name == ADALORA:
        patterns["ranks"] = dict(_adalora_rank(k, v) for k, v in _mapping(fields, "rank_pattern").items())
    else:
        patterns["rank_pattern"] = {
            k: _rank(f"rank_pattern[{k!r}]", v) for k, v in _mapping(fields, "rank_pattern").items()
        }
        patterns["alpha_pattern"] = {
            k: _number(f"alpha_pattern[{k!r}]", v) for k, v in _mapping(fields, "alpha_pattern").items()
        }
    rank_setting = "init_r" if name == ADALORA else "r"
    return PeftConfig(
        method=name,
        rank=_rank(rank_setting, fields.get(rank_setting, _DEFAULT_RANK.get(name, 8))),
        alpha=_number("lora_alpha", fields.get("lora_alpha", 8)),
        use_rslora=name == LORA and _flag("use_rslora", fields.get("use_rslora")),
        use_dora=_flag("use_dora", fields.get("use_dora")),
        lora_bias=_flag("lora_bias", fields.get("lora_bias")),
        bias=_bias(fields, name),
        target_modules=_names(fields, "target_modules"),
        exclude_modules=_names(fields, "exclude_modules"),
        feedforward_modules=_names(fields, "feedforward_modules"),
        layers_to_transform=_layers(fields.get("layers_to_transform")),
        layers_pattern=_as_tuple(_names(fields, "layers_pattern")),
        base_model_name_or_path=base_name or "",
        invocation_token_ids=_invocation(fields.get("alora_invocation_tokens")),
        outside=read_outside(fields),
        **patterns,
    )


def _method(fields: dict[str, Any]) -> str:
    name = fields.get("peft_type")
    if name is None:
        raise AdapterIncompatibleError(f'{FILE}: peft_type is missing: PEFT writes "LORA" for LoRA')
    served = ", ".join(METHODS)
    if isinstance(name, str) and name in REFUSED_METHODS:
        what, remedy = REFUSED_METHODS[name]
        raise AdapterIncompatibleError(f'{FILE}: peft_type "{name}" ({what}) is not served, only {served}: {remedy}')
    if not isinstance(name, str) or name not in METHODS:
        meant = str(name).rpartition(".")[2].upper()  # of a PeftType's repr, too
        remedy = f'write "{meant}"' if meant in METHODS else "train LoRA or DoRA instead"
        raise AdapterIncompatibleError(f"{FILE}: peft_type {_shown(name)} is not served, only {served}: {remedy}")
    return name


def _refuse_unserved(fields: dict[str, Any], method: Method) -> None:
    for name, why in method.refused.items():
        if not _is_off(fields.get(name)):
            raise AdapterIncompatibleError(f"{FILE}: {name} = {_shown(fields[name])}: {why}")
    for name in ("bias", "task_type"):
        if not isinstance(fields.get(name), str | None):
            raise _wrong(name, fields[name], "a string")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterIncompatibleError(
            f"{FILE}: task_type = {_shown(fields['task_type'])}: only CAUSAL_LM is served; train the adapter for it"
        )
    init = fields.get("init_lora_weights")
    if not isinstance(init, str | bool | None):
        raise _wrong("init_lora_weights", init, "true, false or a string")
    if isinstance(init, str) and init.lower() not in _HARMLESS_INITS:
        raise AdapterIncompatibleError(
            f"{FILE}: init_lora_weights = {_shown(init)} changes the base weights; convert the checkpoint to plain LoRA "
            "(PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for name, value in fields.items():
        if value and value != "none" and not method.knows(name):
            raise AdapterIncompatibleError(
                f"{FILE}: unknown setting {name[:100]} = {_shown(value)}: it may change what the adapter computes; "
                "remove it if it does not"
            )
    for name, why in _MISSING_NAMES.items():
        if name in method.used and fields.get(name) is None:
            raise AdapterIncompatibleError(f"{FILE}: {name} is missing: {why}")
    if fields.get("use_dora") and fields.get("lora_bias"):
        raise AdapterIncompatibleError(f"{FILE}: lora_bias with use_dora: PEFT has no such combination")
    if "save_projection" in method.used and not _flag("save_projection", fields.get("save_projection", True)):
        raise AdapterIncompatibleError(
            f"{FILE}: save_projection = false: the file lacks VeRA's shared matrices, and a random generator's numbers may "
            "differ between versions and devices; train with save_projection = true, or convert the adapter with PEFT's "
            "convert_to_lora"
        )


def _bias(fields: dict[str, Any], method: str) -> str:
    value = "none" if fields.get("bias") is None else fields["bias"]
    only = "vera_only" if method == VERA else "lora_only"
    if value not in ("none", "all", only):
        raise AdapterIncompatibleError(f'{FILE}: bias = {_shown(value)} is not one of "none", "all", "{only}"')
    return "only" if value == only else str(value)


def _adalora_rank(name: str, kept: Any) -> tuple[str, int]:
    """Return a module and its rank from an entry of AdaLoRA's rank_pattern: which singular values its budget kept."""
    match = _ADALORA_KEY.fullmatch(name[:1000])
    if match is None:
        raise _wrong(f"rank_pattern[{name[:200]!r}]", kept, "an entry of AdaLoRA, whose names end with lora_E")
    if not isinstance(kept, list) or not all(isinstance(each, bool) for each in kept):
        raise _wrong(f"rank_pattern[{name[:200]!r}]", kept, "a list of true and false")
    return match["module"], sum(kept)


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


def _invocation(value: Any) -> tuple[int, ...]:
    name = "alora_invocation_tokens"
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= MAX_INT32 for item in value):
        raise _wrong(name, value, "a list of token ids")
    if not 0 < len(value) <= MAX_INVOCATION_TOKENS:
        raise AdapterIncompatibleError(
            f"{FILE}: {name} has {len(value)} tokens; an adapter that a sequence activates needs 1 to {MAX_INVOCATION_TOKENS}"
        )
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
