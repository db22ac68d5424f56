"""Checks config, tensors and base model against each other; a checkpoint in which they disagree is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError

from loraplex_adapter_store.checkpoint.dialects import normalise, peft_config_data
from loraplex_adapter_store.checkpoint.module_rules import ModuleRules
from loraplex_adapter_store.checkpoint.patterns import PatternMatcher
from loraplex_adapter_store.checkpoint.peft_config import PeftConfig, parse_peft_config
from loraplex_adapter_store.checkpoint.safetensors_file import MAX_BFLOAT16, Tensor, read_tensors
from loraplex_adapter_store.checkpoint.tensor_names import module_name, parse_tensor_name, tensor_name
from loraplex_adapter_store.checkpoint.trial import check_trial

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_common.base_model import BaseModelInfo
    from loraplex_common.projections import Projection

    from loraplex_adapter_store.checkpoint.confinement import Confinement

MIN_FLOAT32: Final = 2.0**-126  # smaller values lose bits, or are 0 on some devices


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted projection: ``y += scaling * B A x``.

    Attributes:
        name: Its dotted name in the base model.
        lora_a: ``[rank, in_features]``.
        lora_b: ``[out_features, rank]``.
    """

    layer: int
    projection: str
    name: str
    rank: int
    scaling: float
    lora_a: Tensor
    lora_b: Tensor


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked adapter.

    Attributes:
        modules: By layer, then in the layer's order.
        warnings: What is odd about it although it can be served, for the author of the import.
    """

    base_fingerprint: str
    modules: tuple[Module, ...]
    warnings: tuple[str, ...] = ()


def read_checkpoint(
    config_data: bytes,
    weights: bytes | bytearray | memoryview,
    base: BaseModelInfo,
    confinement: Confinement | None = None,
    *,
    weights_file: str = WEIGHTS_FILE,
) -> Checkpoint:
    """Parse and check a LoRA checkpoint, of PEFT or of a known dialect, against a base model.

    Args:
        config_data: adapter_config.json.
        weights: adapter_model.safetensors; not copied, except what a dialect transposes or fuses.
        base: The base model.
        confinement: Owner of the child process that matches patterns, if there are any.
        weights_file: Name of the weights' file, for messages.

    Raises:
        AdapterCorruptUploadError: If a file is damaged, a tensor holds NaN or infinity, or a trial product leaves the
            range of engines' dtypes.
        AdapterIncompatibleError: If it cannot be served on this base; the message names setting or tensor.
    """
    parse_peft_config(peft_config_data(config_data))  # an error of the settings is said before one of the tensors
    written = normalise(config_data, read_tensors(weights, file=weights_file), base)
    config = parse_peft_config(written.config)
    found = _group_tensors(written.tensors, base)
    rules = ModuleRules(config, base, PatternMatcher(confinement=confinement))
    targeted = rules.targeted()
    expected = {(layer, projection.name) for layer, projection in targeted}
    for key, pair in found.items():
        if key not in expected:
            name = next(iter(pair.values())).name
            raise AdapterIncompatibleError(
                f"tensor {name} is not explained by target_modules, exclude_modules and layers_to_transform of {CONFIG_FILE}"
            )
    modules: list[Module] = []
    for layer, projection in targeted:
        pair = found.get((layer, projection.name), {})
        for matrix in "AB":
            if matrix not in pair:
                raise AdapterIncompatibleError(
                    f"tensor {tensor_name(module_name(layer, projection.path), matrix)} is missing, although {CONFIG_FILE} targets it"
                )
        modules.append(_check_module(config, rules, base, layer, projection, pair["A"], pair["B"]))
    check_trial(modules, base)
    return Checkpoint(base.fingerprint, tuple(modules), (*written.notes, *_warnings(modules)))


def _group_tensors(tensors: dict[str, Tensor], base: BaseModelInfo) -> dict[tuple[int, str], dict[str, Tensor]]:
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    paths = {projection.path for layer in base.layers for projection in layer}
    for name, tensor in tensors.items():
        part = parse_tensor_name(name, paths)
        if part.layer >= base.num_layers:
            raise AdapterIncompatibleError(f"tensor {name}: the base model {base.name} has {base.num_layers} layers")
        if all(projection.path != part.path for projection in base.layers[part.layer]):
            raise AdapterIncompatibleError(f"tensor {name}: layer {part.layer} of {base.name} has no {part.path}")
        pair = found.setdefault((part.layer, part.projection), {})
        if part.matrix in pair:
            raise AdapterCorruptUploadError(f"tensor {name} appears twice, with and without '.default'")
        pair[part.matrix] = tensor
    return found


def _check_module(
    config: PeftConfig,
    rules: ModuleRules,
    base: BaseModelInfo,
    layer: int,
    projection: Projection,
    a: Tensor,
    b: Tensor,
) -> Module:
    name = module_name(layer, projection.path)
    rank = rules.rank(name)
    alpha, alpha_setting = rules.alpha(name)
    columns, outputs = projection.shape
    for tensor, shape in ((a, (rank, columns)), (b, (outputs, rank))):
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise AdapterIncompatibleError(
                f"tensor {tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}: it is no matrix, as when shards "
                "(DeepSpeed ZeRO-3, FSDP) are not gathered before they are saved"
            )
        if tensor.shape != shape:
            raise AdapterIncompatibleError(
                f"tensor {tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}: rank {rank} of {CONFIG_FILE} "
                f"and base model {base.name}"
            )
    scaling = _checked_scaling(config, rank, alpha, f"{CONFIG_FILE}: {alpha_setting} = {alpha:g}", name)
    _check_values(a, b, scaling, name)
    return Module(layer, projection.name, name, rank, scaling, a, b)


def _checked_scaling(config: PeftConfig, rank: int, alpha: float, setting: str, name: str) -> float:
    """Return a module's scaling if engines, which hold it in fp32, can tell it from 0 and from infinity."""
    scaling = config.scaling(rank, alpha)
    if not MIN_FLOAT32 <= abs(scaling) <= MAX_BFLOAT16:
        raise AdapterIncompatibleError(
            f"{setting} makes the scaling of {name} {scaling:g}, so the base model would answer in the adapter's place; set it "
            f"to the value of training, often {rank} or {2 * rank} for this rank"
        )
    return scaling


def _check_values(a: Tensor, b: Tensor, scaling: float, name: str) -> None:
    largest = (a.largest(), b.largest())
    for tensor, value in zip((a, b), largest, strict=True):
        if not value <= MAX_BFLOAT16:  # NaN compares false
            raise AdapterCorruptUploadError(f"tensor {tensor.name} holds NaN, infinity or values beyond bf16's range")
    if not abs(scaling) * largest[0] * largest[1] <= MAX_BFLOAT16:
        raise AdapterCorruptUploadError(
            f"{name}: scaling {scaling:g} times the largest values of A and B, {largest[0]:g} and {largest[1]:g}, is beyond "
            "bf16's range"
        )


def _warnings(modules: list[Module]) -> Iterator[str]:
    if all(module.lora_a.largest() == 0 or module.lora_b.largest() == 0 for module in modules):
        yield (
            "A or B is zero in every module: the adapter answers as the base model does. Is it saved before training, or "
            "without its trained values (FSDP, DeepSpeed: gather first)?"
        )
