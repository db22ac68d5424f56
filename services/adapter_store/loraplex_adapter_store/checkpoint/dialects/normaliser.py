"""Brings a checkpoint of any dialect into PEFT's form: its configuration's fields and its tensors' names and layouts.

Tensors are views of the file; only a transpose, or a choice of rows, is copied. A tensor keeps its name of the file for
messages, and the key under which it is returned is PEFT's.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraplex_common.adapter_folder import CONFIG_FILE
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError

from loraplex_adapter_store.checkpoint.dialects.configs import read_config
from loraplex_adapter_store.checkpoint.dialects.layouts import Layouts
from loraplex_adapter_store.checkpoint.dialects.names import (
    ALPHA,
    PEFT_PREFIX,
    A,
    multimodal_prefix,
    read_name,
    shared_name,
    unwrapped,
)
from loraplex_adapter_store.checkpoint.dialects.table import RULES
from loraplex_adapter_store.checkpoint.dialects.targets import (
    with_last_layers,
    with_projections,
    with_target_parameters,
)
from loraplex_adapter_store.checkpoint.dialects.tensor_ops import number
from loraplex_adapter_store.checkpoint.safetensors_file import Tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from loraplex_common.base_model import BaseModelInfo

    from loraplex_adapter_store.checkpoint.dialects.names import Reading


@dataclass(frozen=True, slots=True)
class Normalised:
    """A checkpoint in PEFT's form.

    Attributes:
        config: adapter_config.json.
        tensors: PEFT's name -> tensor; a tensor's own name is that of the file.
        notes: What was read by which rule, for the author of the import; empty for PEFT's own form.
        prefix: What the names of the text model's modules begin with in the multimodal model that the adapter was trained
            on, in the place of ``model.``; patterns of the configuration mean these names.
    """

    config: bytes
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    prefix: str = "model."


def normalise(config: bytes, tensors: Mapping[str, Tensor], base: BaseModelInfo) -> Normalised:
    """Bring a checkpoint into PEFT's form.

    Args:
        config: adapter_config.json as uploaded.
        tensors: The file's tensors by their names.
        base: The base model, whose widths and heads decide how fused and transposed tensors are read.

    Raises:
        AdapterCorruptUploadError: If two tensors come to one name, or the configuration is no JSON.
        AdapterIncompatibleError: If the file allows several readings; tensor or setting is named.
    """
    form = read_config(config)
    if form is None:
        return Normalised(config, dict(tensors))
    fields = dict(form.fields)
    paths = sorted({each.path for layer in base.layers for each in layer}, key=len, reverse=True)
    own = ("lora_A", "lora_B") if fields.get("peft_type") == "ADALORA" else ()  # parameters there, as in loralib
    outside = [each.path for each in base.outside]
    readings = {name: read_name(name, paths, own, outside) for name in tensors}
    used = Counter(rule for reading in readings.values() if reading is not None for rule in reading.rules)
    _check_adapter_names(readings, tensors)
    if form.last_layers is not None:
        read = {path for reading in readings.values() if reading is not None for path in reading.paths}
        fields = with_last_layers(form, read, base) | {
            "ensure_weight_tying": True
        }  # there a tied matrix has one adapter
    with_projections(fields, used.keys())
    layouts = Layouts(base, is_mlx=form.is_mlx, tensor_parallel=fields.get("tensor_model_parallel_size"))
    if any(rule.startswith("megatron") for rule in used):
        fields.pop("tensor_model_parallel_size", None)
    placed, alphas = _placed(tensors, readings, layouts, used)
    _apply_alphas(alphas, placed, fields, used)
    rules = list(form.rules)
    if with_target_parameters(fields, base):
        _refuse_nested(tensors)
        rules.append("target_parameters")
    notes = [_note(rule) for rule in rules] + [_note(rule, count) for rule, count in used.items()]
    data = config if fields == form.fields and not form.rules else json.dumps(fields).encode()
    return Normalised(data, placed, tuple(notes), multimodal_prefix(tensors) if used["multimodal"] else "model.")


def _note(rule: str, num_tensors: int | None = None) -> str:
    known = RULES[rule]
    counted = "" if num_tensors is None else f" ({num_tensors} tensor{'s' if num_tensors > 1 else ''})"
    return f"read as {known.program} writes it{counted}: {known.form}: {known.meaning}".replace("`", "'")


def _check_adapter_names(readings: Mapping[str, Reading | None], names: Collection[str]) -> None:
    first: dict[str, str] = {}
    for name in names:
        reading = readings[name]
        adapter = shared_name(unwrapped(name)[0])[1] if reading is None else reading.adapter
        if adapter:
            first.setdefault(adapter, name)
    if len(first) > 1:
        (one, one_name), (other, other_name) = list(first.items())[:2]
        raise AdapterIncompatibleError(
            f"the file holds several adapters: tensor {one_name[:200]} is of {one!r}, {other_name[:200]} of {other!r}; save "
            "each by itself (PEFT: save_pretrained with selected_adapters)"
        )


def _placed(
    tensors: Mapping[str, Tensor], readings: Mapping[str, Reading | None], layouts: Layouts, used: Counter[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors under PEFT's names, and those that hold alphas by the names of their modules."""
    placed: dict[str, Tensor] = {}
    alphas: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        reading = readings[name]
        if reading is None:
            # What modules share may be wrapped too; a tensor of a layer is refused under the name that the file has.
            bare, rules = unwrapped(name) if "layers." not in name else (name, ())
            bare, adapter = shared_name(bare)
            used.update((*rules, "adapter_name") if adapter else rules)
            found = {bare: tensor}
        elif reading.part == ALPHA:
            _put(alphas, reading.names()[0], tensor)
            continue
        else:
            found = layouts.arranged(reading, tensor)
        for ours, arranged in found.items():
            _put(placed, ours, arranged)
    return placed, alphas


def _put(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in tensors:
        raise AdapterCorruptUploadError(
            f"tensor {name[:200]} appears twice, as {tensors[name].name[:200]} and as {tensor.name[:200]}"
        )
    tensors[name] = tensor


def _apply_alphas(
    alphas: Mapping[str, Tensor], placed: Mapping[str, Tensor], fields: dict[str, Any], used: Mapping[str, int]
) -> None:
    """Compare alphas that are tensors with the configuration, or put them there if it says nothing of them."""
    is_silent = fields.get("lora_alpha") is None and not fields.get("alpha_pattern")
    values: dict[str, float] = {}
    for name, tensor in alphas.items():
        stem = name.removesuffix(ALPHA)
        value = number(tensor)
        if value is None:
            raise AdapterIncompatibleError(
                f"tensor {tensor.name[:200]}: an alpha of shape {list(tensor.shape)} is no number"
            )
        if stem + A not in placed:
            raise AdapterIncompatibleError(f"tensor {tensor.name[:200]}: its module has no matrices in the file")
        if not is_silent and (fields.get("alpha_pattern") or value != fields.get("lora_alpha")):
            raise AdapterIncompatibleError(
                f"tensor {tensor.name[:200]} is {value:g}, {CONFIG_FILE} has lora_alpha = {fields.get('lora_alpha')}"
                f"{' and an alpha_pattern' if fields.get('alpha_pattern') else ''}: leave one of them out"
            )
        values[stem.removeprefix("base_model.model.").rstrip(".")] = value
    if not is_silent or not (values or used.get("kohya") or used.get("diffusers")):
        return
    for name, tensor in placed.items():
        if name.startswith(PEFT_PREFIX) and name.endswith(A):
            module = name.removeprefix("base_model.model.").removesuffix(f".{A}")
            if module not in values:
                raise AdapterIncompatibleError(
                    f"tensor {tensor.name[:200]}: neither {CONFIG_FILE} (lora_alpha) nor a tensor says its alpha"
                )
    fields["alpha_pattern"] = values


def _refuse_nested(tensors: Mapping[str, Tensor]) -> None:
    """Refuse what PEFT writes for two parameters of one module: one adapter around another."""
    for name in tensors:
        if ".base_layer.lora_" in name:
            raise AdapterIncompatibleError(
                f"tensor {name[:200]}: target_parameters names several parameters of its module; only a projection's weight is "
                "served"
            )
