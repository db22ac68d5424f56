"""Checks config, tensors and base model against each other; a checkpoint in which they disagree is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError

from loraplex_adapter_store.checkpoint import tensor_names as names
from loraplex_adapter_store.checkpoint.base_biases import BaseBiases
from loraplex_adapter_store.checkpoint.base_weights import BaseWeights
from loraplex_adapter_store.checkpoint.dialects import normalise, peft_config_data
from loraplex_adapter_store.checkpoint.effects import check_shared_inputs, warnings_of
from loraplex_adapter_store.checkpoint.folding import folded_of
from loraplex_adapter_store.checkpoint.method_readers import Source, checked, optional_slots_of, parts_of, slots_of
from loraplex_adapter_store.checkpoint.module_rules import ModuleRules
from loraplex_adapter_store.checkpoint.outside import read_outside_modules
from loraplex_adapter_store.checkpoint.outside_names import split_outside
from loraplex_adapter_store.checkpoint.parts import Module
from loraplex_adapter_store.checkpoint.patterns import PatternMatcher
from loraplex_adapter_store.checkpoint.peft_config import PeftConfig, parse_peft_config
from loraplex_adapter_store.checkpoint.peft_methods import FLORA, LORA, VERA
from loraplex_adapter_store.checkpoint.rank_one import fold_rank_one
from loraplex_adapter_store.checkpoint.safetensors_file import Tensor, read_tensors
from loraplex_adapter_store.checkpoint.tensor_names import module_name, parse_tensor_name, tensor_name
from loraplex_adapter_store.checkpoint.trial import check_trial

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from loraplex_common.base_model import BaseModelInfo
    from loraplex_common.projections import Projection

    from loraplex_adapter_store.checkpoint.confinement import Confinement

_Found = dict[tuple[int, str], dict[str, Tensor]]
"""(layer, projection) -> its tensors by slot."""
_ANNOUNCED: Final = {
    names.MAGNITUDE: "has use_dora = true",
    names.LORA_B_BIAS: "has lora_bias = true",
    names.SHIRA_INDICES: "targets it: without it, a random generator would decide where the values are",
}
_TRAINED_BIASES: Final = (names.ADAPTED_BIAS, names.OTHER_BIAS)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked adapter.

    Attributes:
        modules: By layer, then in the layer's order.
        warnings: What is odd about it although it can be served, for the author of the import.
        invocation_token_ids: The sequence that it applies from; empty: it applies to all tokens.
        method: ``peft_type``.
        rules: Those of the warnings that say by which rules of dialects the file was read.
        folded: What was folded into other values, in words.
    """

    base_fingerprint: str
    modules: tuple[Module, ...]
    warnings: tuple[str, ...] = ()
    invocation_token_ids: tuple[int, ...] = ()
    method: str = LORA
    rules: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()


def read_checkpoint(
    config_data: bytes,
    weights: bytes | bytearray | memoryview,
    base: BaseModelInfo,
    confinement: Confinement | None = None,
    *,
    base_dir: Path | None = None,
    weights_file: str = WEIGHTS_FILE,
) -> Checkpoint:
    """Parse and check a checkpoint, of PEFT or of a known dialect, against a base model.

    Args:
        config_data: adapter_config.json.
        weights: adapter_model.safetensors; not copied, except what a dialect transposes or fuses.
        base: The base model.
        confinement: Owner of the child process that matches patterns, if there are any.
        base_dir: The base model's files, which trained biases and replaced rows are compared with; they are refused without it.
        weights_file: Name of the weights' file, for messages.

    Raises:
        AdapterCorruptUploadError: If a file is damaged, a tensor holds NaN or infinity, or a trial product leaves the
            range of engines' dtypes.
        AdapterIncompatibleError: If it cannot be served on this base; the message names setting or tensor.
    """
    parse_peft_config(peft_config_data(config_data))  # an error of the settings is said before one of the tensors
    written = normalise(config_data, read_tensors(weights, file=weights_file), base)
    config = parse_peft_config(written.config)
    inside, outside = split_outside(written.tensors, base)
    found, shared = _group_tensors(inside, base, config)
    rules = ModuleRules(config, base, PatternMatcher(confinement=confinement), written.prefix)
    sites = _sites(found, config, rules, base)
    _check_shared(shared, config, [each for layer, each in sites if names.VERA_D in found[layer, each.name]])
    base_weights = BaseWeights(base_dir)
    modules = _read_modules(config, found, shared, sites, rules, base, base_weights)
    others, replaced = read_outside_modules(config, rules, base, base_weights, outside)
    modules += others
    if not modules:
        raise AdapterIncompatibleError(
            f"{CONFIG_FILE}: no module is left that does anything (ranks and biases are 0): it is the base model"
        )
    check_shared_inputs(modules, base)
    check_trial(modules, base)
    return Checkpoint(
        base.fingerprint,
        tuple(modules),
        (*written.notes, *warnings_of(modules)),
        _checked_invocation(config, base, found),
        method=config.method,
        rules=written.notes,
        folded=(*folded_of(config, modules), *replaced),
    )


def _read_modules(
    config: PeftConfig,
    found: _Found,
    shared: dict[str, Tensor],
    sites: list[tuple[int, Projection]],
    rules: ModuleRules,
    base: BaseModelInfo,
    weights: BaseWeights,
) -> list[Module]:
    """Return the modules that change anything, in the order of their sites."""
    biases = BaseBiases(weights)
    modules: list[Module] = []
    for layer, projection in sites:
        name = module_name(layer, projection.path)
        source = Source(
            config=config,
            rules=rules,
            projection=projection,
            name=name,
            base_name=base.name,
            tensors=found[layer, projection.name],
            shared=shared,
            base_biases=biases,
        )
        if parts := parts_of(source):
            modules.append(Module(layer, projection.name, name, tuple(parts)))
    return fold_rank_one(modules, base) if config.method == FLORA else modules


def _checked_invocation(config: PeftConfig, base: BaseModelInfo, found: _Found) -> tuple[int, ...]:
    """Return the sequence that activates the adapter; empty without one."""
    if config.invocation_token_ids and config.use_dora:
        raise AdapterIncompatibleError(
            f"{CONFIG_FILE}: alora_invocation_tokens together with use_dora: PEFT has no such variant; train one of the two"
        )
    trained = (tensors[slot] for tensors in found.values() for slot in _TRAINED_BIASES if slot in tensors)
    if config.invocation_token_ids and (bias := next(trained, None)) is not None:
        raise AdapterIncompatibleError(
            f"tensor {bias.name}: a trained bias of the base model together with alora_invocation_tokens: PEFT adds it to the "
            "tokens before the sequence too, where only the base model may answer; train with bias = none, or with lora_bias"
        )
    for token_id in config.invocation_token_ids:
        if token_id >= base.vocab_size:
            raise AdapterIncompatibleError(
                f"{CONFIG_FILE}: alora_invocation_tokens: {token_id} is not below the {base.vocab_size} tokens of {base.name}"
            )
    return config.invocation_token_ids


def _group_tensors(
    tensors: dict[str, Tensor], base: BaseModelInfo, config: PeftConfig
) -> tuple[_Found, dict[str, Tensor]]:
    """Sort tensors by module and slot; those that all modules share apart."""
    found: _Found = {}
    shared: dict[str, Tensor] = {}
    paths = {projection.path for layer in base.layers for projection in layer}
    slots = slots_of(config) | optional_slots_of(config)
    for name, tensor in tensors.items():
        if config.method == VERA and (slot := names.SHARED_VERA.get(name)):
            group = shared
        else:
            part = parse_tensor_name(name, paths, slots, tensor.name)
            if part.layer >= base.num_layers:
                raise AdapterIncompatibleError(
                    f"tensor {tensor.name}: the base model {base.name} has {base.num_layers} layers"
                )
            if all(projection.path != part.path for projection in base.layers[part.layer]):
                raise AdapterIncompatibleError(
                    f"tensor {tensor.name}: layer {part.layer} of {base.name} has no {part.path}"
                )
            group, slot = found.setdefault((part.layer, part.projection), {}), part.slot
        if slot in group:
            raise AdapterCorruptUploadError(
                f"tensor {tensor.name} appears twice, under another spelling as {group[slot].name}"
            )
        group[slot] = tensor
    return found, shared


def _sites(found: _Found, config: PeftConfig, rules: ModuleRules, base: BaseModelInfo) -> list[tuple[int, Projection]]:
    """Return the modules that a checkpoint changes, in layer order, all of whose tensors are there and explained."""
    targeted = rules.targeted()
    expected = {(layer, projection.name) for layer, projection in targeted}
    for key, tensors in found.items():
        for slot, tensor in tensors.items():
            if (slot == names.OTHER_BIAS) == (key in expected):
                raise AdapterIncompatibleError(_unexplained(slot, tensor, key in expected))
    for layer, projection in targeted:
        for slot in sorted(slots_of(config)):
            if slot not in found.get((layer, projection.name), {}):
                raise AdapterIncompatibleError(
                    f"tensor {tensor_name(module_name(layer, projection.path), slot)} is missing, although {CONFIG_FILE} "
                    f"{_ANNOUNCED.get(slot, 'targets it')}; save the adapter again with all of its tensors"
                )
    if unknown := config.ranks.keys() - {module_name(layer, each.path) for layer, each in targeted}:
        raise AdapterIncompatibleError(
            f"{CONFIG_FILE}: rank_pattern names {min(unknown)[:200]}, which target_modules does not"
        )
    return [
        (layer, projection)
        for layer, offered in enumerate(base.layers)
        for projection in offered
        if (layer, projection.name) in found
    ]


def _unexplained(slot: str, tensor: Tensor, is_targeted: bool) -> str:
    if slot == names.OTHER_BIAS and is_targeted:
        expected = tensor.name.removesuffix(names.OTHER_BIAS) + names.ADAPTED_BIAS
        return f"tensor {tensor.name}: PEFT ignores it, as the module is adapted; it loads {expected}"
    return (
        f"tensor {tensor.name} is not explained by target_modules, exclude_modules and layers_to_transform of {CONFIG_FILE}; "
        "correct these to what was trained"
    )


def _check_shared(shared: Mapping[str, Tensor], config: PeftConfig, adapted: list[Projection]) -> None:
    """Check VeRA's shared matrices: as large as the largest of the adapted projections needs them."""
    if config.method != VERA:
        return
    shapes = {
        "A": (config.rank, max(each.in_features for each in adapted)),
        "B": (max(each.out_features for each in adapted), config.rank),
    }
    for name, slot in names.SHARED_VERA.items():
        if slot not in shared:
            raise AdapterIncompatibleError(
                f"tensor {name} is missing: the file lacks VeRA's shared matrices; train with save_projection = true"
            )
        checked(shared[slot], shapes[slot], f"rank {config.rank} of {CONFIG_FILE} and the largest adapted projection")
