"""Which modules a configuration targets, where a dialect names them in a way of its own."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.adapter_folder import CONFIG_FILE
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError

from loraplex_adapter_store.checkpoint.tensor_names import module_name

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from loraplex_common.base_model import BaseModelInfo

    from loraplex_adapter_store.checkpoint.dialects.configs import ConfigForm

_TUNE: Final = {
    "output": ("lm_head",),
    "output_proj": ("o_proj",),
    "w1": ("gate_proj",),
    "w2": ("down_proj",),
    "w3": ("up_proj",),
}
_META: Final = {f"w{x}": (f"{x}_proj",) for x in "qkvo"}
_MEGATRON: Final = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_q": ("q_proj",),
    "linear_k": ("k_proj",),
    "linear_v": ("v_proj",),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc1_gate": ("gate_proj",),
    "linear_fc1_up": ("up_proj",),
    "linear_fc2": ("down_proj",),
}
_NAMES: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = MappingProxyType(
    {
        "torchtune": _TUNE,
        "meta": _TUNE | _META,
        "megatron": _MEGATRON,
        "megatron_qkv": _MEGATRON,
        "megatron_fc1": _MEGATRON,
    }
)
"""Rule -> the program's name of a module -> names of projections."""
_FOREIGN: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "torchtune": frozenset({"attn", "model"}),
        "meta": frozenset({"attention", "feed_forward", "model"}),
        "headless": frozenset({"model"}),
        "multimodal": frozenset({"model", "language_model"}),
    }
    | dict.fromkeys(("megatron", "megatron_qkv", "megatron_fc1"), frozenset({"decoder", "self_attention"}))
)
"""Rule of another program's modules -> what only one of its names and PEFT's has in it, besides names of projections."""
_MULTIMODAL: Final = re.compile(r"(?:model\.)?language_model\.(?:model\.)?")
_PATTERNS: Final = ("rank_pattern", "alpha_pattern")


def with_last_layers(form: ConfigForm, paths: Collection[str], base: BaseModelInfo) -> dict[str, Any]:
    """Return the fields with the layers and the modules that MLX-LM means: the last ones, and those of the file.

    Args:
        form: The configuration.
        paths: Paths inside their layers of all modules that have tensors.
        base: The base model.
    """
    fields = dict(form.fields)
    if form.last_layers is None:
        return fields
    if not fields["target_modules"]:  # all linear modules; older versions took q_proj and v_proj
        fields["target_modules"] = sorted(paths)
    if 0 < form.last_layers < base.num_layers:
        fields["layers_to_transform"] = list(range(base.num_layers - form.last_layers, base.num_layers))
    return fields


def with_projections(fields: dict[str, Any], rules: Collection[str]) -> None:
    """Replace a program's names of modules in ``target_modules`` by those of projections.

    Raises:
        AdapterIncompatibleError: If a pattern of ranks or alphas has such a name.
    """
    names = {name: ours for rule in rules for name, ours in _NAMES.get(rule, {}).items()}
    foreign = frozenset().union(*(_FOREIGN.get(rule, ()) for rule in rules))
    if not foreign:
        return
    for setting in _PATTERNS:
        patterns = fields.get(setting)
        for pattern in patterns if isinstance(patterns, dict) else ():
            # A pattern that matched there and not here, or the other way round, would leave a module with another alpha.
            if "^" in pattern or not {*re.findall(r"\w+", pattern)}.isdisjoint(names.keys() | foreign):
                raise AdapterIncompatibleError(
                    f"{CONFIG_FILE}: {setting} names {pattern[:80]!r}, which matches otherwise in the training program; save the "
                    "adapter with PEFT's names, or begin the pattern at 'layers.'"
                )
    targets = fields.get("target_modules")
    if isinstance(targets, list):
        fields["target_modules"] = [
            each for target in targets for each in _projections(target, names, is_multimodal="multimodal" in rules)
        ]


def _projections(target: Any, names: Mapping[str, tuple[str, ...]], *, is_multimodal: bool) -> tuple[Any, ...]:
    if not isinstance(target, str):
        return (target,)
    found = names.get(target.rpartition(".")[2], (target,)) if names else (target,)
    return tuple(_MULTIMODAL.sub("model.", each, count=1) for each in found) if is_multimodal else found


def with_target_parameters(fields: dict[str, Any], base: BaseModelInfo) -> bool:
    """Replace ``target_parameters`` by the modules whose weights they are; return whether there were any.

    PEFT looks neither at layers_to_transform nor at exclude_modules for them, and matches patterns of ranks with
    ``.weight`` behind the module's name.

    Raises:
        AdapterCorruptUploadError: If they are no list of names.
        AdapterIncompatibleError: If one is no weight of a projection, or other settings say more of them.
    """
    parameters = fields.get("target_parameters")
    if not parameters:
        return False
    if not isinstance(parameters, list) or not all(isinstance(each, str) for each in parameters):
        raise AdapterCorruptUploadError(f"{CONFIG_FILE}: target_parameters is no list of names")
    modules = [module_name(layer, each.path) for layer, offered in enumerate(base.layers) for each in offered]
    found: list[str] = []
    for parameter in parameters:
        name = parameter.removesuffix(".weight")
        matched = [module for module in modules if f".{module}".endswith(f".{name}")]
        if name == parameter or not matched:
            what = "experts of a mixture" if "experts" in parameter else "a parameter that is no projection's weight"
            raise AdapterIncompatibleError(
                f"{CONFIG_FILE}: target_parameters has {parameter[:100]!r}: LoRA on {what} is not served; train with "
                "target_modules on the projections"
            )
        found += matched
    for setting in (*_PATTERNS, "exclude_modules"):
        if fields.get(setting):
            raise AdapterIncompatibleError(
                f"{CONFIG_FILE}: {setting} beside target_parameters: PEFT does not apply it to the modules that it names; "
                "train with target_modules alone"
            )
    targets = fields.get("target_modules")
    if isinstance(targets, str) and targets:
        whole = "|".join(re.escape(parameter.removesuffix(".weight")) for parameter in parameters)
        fields["target_modules"] = rf"(?:{targets})|(?:.*\.)?(?:{whole})"
    else:
        fields["target_modules"] = [*(targets or ()), *found]
    del fields["target_parameters"]
    return True
