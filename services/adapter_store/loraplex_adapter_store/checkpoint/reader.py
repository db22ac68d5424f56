"""Brings config, tensors and base model together: each must account for the others, or the checkpoint is refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from loraplex_common.adapter_image import PROJECTIONS
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError

from loraplex_adapter_store.checkpoint.patterns import PatternMatcher
from loraplex_adapter_store.checkpoint.peft_config import PeftConfig, parse_peft_config
from loraplex_adapter_store.checkpoint.safetensors_file import Tensor, read_tensors

if TYPE_CHECKING:
    from loraplex_common.base_model import BaseModelInfo

BLOCKS: Final = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in PROJECTIONS}
_UNSERVED_MODULES: Final = ("lm_head", "model.embed_tokens")
_KEY: Final = re.compile(
    r"base_model\.model\.(?P<module>model\.layers\.(?P<layer>0|[1-9]\d{0,5})\.(?P<block>self_attn|mlp)\."
    r"(?P<projection>[a-z]+_proj))\.lora_(?P<matrix>[AB])(?:\.default)?\.weight",
    re.ASCII,
)
_TELLTALES: Final = (
    ("lora_magnitude_vector", "DoRA's magnitude vectors are not served"),
    ("lora_embedding", "LoRA on embeddings is not served"),
    ("embed_tokens", "trained embeddings are not served"),
    ("lm_head", "LoRA on or a trained lm_head is not served"),
    ("modules_to_save", "fully trained modules are not served"),
    (".bias", "biases are not served"),
)


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted projection: ``y += scaling * B A x``.

    Attributes:
        lora_a: ``[rank, in_features]``.
        lora_b: ``[out_features, rank]``.
    """

    layer: int
    projection: str
    rank: int
    scaling: float
    lora_a: Tensor
    lora_b: Tensor


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked adapter.

    Attributes:
        modules: Sorted by (layer, order of ``PROJECTIONS``).
    """

    base_fingerprint: str
    modules: tuple[Module, ...]


def module_name(layer: int, projection: str) -> str:
    """Return a projection's dotted name in the base model."""
    return f"model.layers.{layer}.{BLOCKS[projection]}.{projection}"


def read_checkpoint(config_data: bytes, weights: bytes | bytearray | memoryview, base: BaseModelInfo) -> Checkpoint:
    """Parse and check a PEFT LoRA checkpoint against a base model.

    Raises:
        AdapterCorruptUploadError: If a file is not sound, or a tensor holds NaN or infinity.
        AdapterIncompatibleError: If it cannot be served on this base; the message names setting or tensor.
    """
    config = parse_peft_config(config_data)
    found = _group_tensors(read_tensors(weights, file=WEIGHTS_FILE), base)
    matcher = PatternMatcher()
    expected = _targeted_modules(config, base, matcher)
    for key, pair in found.items():
        if key not in expected:
            name = next(iter(pair.values())).name
            raise AdapterIncompatibleError(
                f"tensor {name} is not explained by target_modules, exclude_modules and layers_to_transform of {CONFIG_FILE}"
            )
    modules: list[Module] = []
    for layer, projection in expected:
        pair = found.get((layer, projection), {})
        for matrix in "AB":
            if matrix not in pair:
                raise AdapterIncompatibleError(
                    f"tensor base_model.model.{module_name(layer, projection)}.lora_{matrix}.weight is missing, "
                    f"although {CONFIG_FILE} targets it"
                )
        modules.append(_check_module(config, base, layer, projection, pair["A"], pair["B"], matcher))
    return Checkpoint(base.fingerprint, tuple(modules))


def _group_tensors(tensors: dict[str, Tensor], base: BaseModelInfo) -> dict[tuple[int, str], dict[str, Tensor]]:
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None or BLOCKS.get(match["projection"]) != match["block"]:
            why = next((text for part, text in _TELLTALES if part in name), "no projection of a served decoder layer")
            raise AdapterIncompatibleError(f"tensor {name[:200]}: {why}")
        layer = int(match["layer"])
        if layer >= base.num_layers:
            raise AdapterIncompatibleError(f"tensor {name}: the base model {base.name} has {base.num_layers} layers")
        pair = found.setdefault((layer, match["projection"]), {})
        if match["matrix"] in pair:
            raise AdapterCorruptUploadError(f"tensor {name} appears twice, with and without '.default'")
        pair[match["matrix"]] = tensor
    return found


def _targeted_modules(config: PeftConfig, base: BaseModelInfo, matcher: PatternMatcher) -> list[tuple[int, str]]:
    """Return (layer, projection) of all modules that PEFT would adapt, in layer order."""
    if not config.target_modules:
        raise AdapterIncompatibleError(f"{CONFIG_FILE}: target_modules is missing")
    for name in _UNSERVED_MODULES:
        if not _is_all_linear(config) and _is_targeted(config, name, None, matcher):
            raise AdapterIncompatibleError(f"{CONFIG_FILE}: target_modules includes {name}, which is not served")
    targeted = [
        (layer, projection)
        for layer in range(base.num_layers)
        for projection in PROJECTIONS
        if _is_targeted(config, module_name(layer, projection), layer, matcher)
    ]
    if not targeted:
        raise AdapterIncompatibleError(f"{CONFIG_FILE}: target_modules matches no projection of base model {base.name}")
    return targeted


def _is_all_linear(config: PeftConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _is_targeted(config: PeftConfig, key: str, layer: int | None, matcher: PatternMatcher) -> bool:
    """Apply PEFT's `check_target_module_exists` to one module name."""
    if isinstance(config.exclude_modules, str):
        if matcher.fullmatch(config.exclude_modules, key, setting="exclude_modules"):
            return False
    elif any(key == name or key.endswith(f".{name}") for name in config.exclude_modules):
        return False
    if _is_all_linear(config):
        return True
    if isinstance(config.target_modules, str):
        return matcher.fullmatch(config.target_modules, key, setting="target_modules")
    if key in config.target_modules:
        return True
    if not any(key.endswith(f".{name}") for name in config.target_modules):
        return False
    if config.layers_to_transform is None:
        return True
    if config.layers_pattern:
        found = (matcher.layer_index(pattern, key) for pattern in config.layers_pattern)
        layer = next((index for index in found if index is not None), None)
    return layer in config.layers_to_transform


def _check_module(
    config: PeftConfig, base: BaseModelInfo, layer: int, projection: str, a: Tensor, b: Tensor, matcher: PatternMatcher
) -> Module:
    name = module_name(layer, projection)
    rank_key = matcher.first_suffix_match(config.rank_pattern, name, setting="rank_pattern")
    alpha_key = matcher.first_suffix_match(config.alpha_pattern, name, setting="alpha_pattern")
    rank = config.rank if rank_key is None else config.rank_pattern[rank_key]
    alpha = config.alpha if alpha_key is None else config.alpha_pattern[alpha_key]
    geometry = base.geometry(dtype="float32", page_bytes=1024 * 1024)
    columns, outputs = geometry.projection_shape(projection)
    for tensor, shape in ((a, (rank, columns)), (b, (outputs, rank))):
        if tensor.shape != shape:
            raise AdapterIncompatibleError(
                f"tensor {tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}: rank {rank} of {CONFIG_FILE} "
                f"and base model {base.name}"
            )
        if not tensor.is_finite():
            raise AdapterCorruptUploadError(f"tensor {tensor.name} holds NaN, infinity or values beyond bf16's range")
    return Module(layer, projection, rank, config.scaling(rank, alpha), a, b)
