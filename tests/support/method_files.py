"""Adapters of every served method for any base model, written with numpy alone; `support.peft_methods` has PEFT's own."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from loraplex_adapter_store.checkpoint.reader import Checkpoint, read_checkpoint
from support.safetensors_files import safetensors_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from loraplex_common.base_model import BaseModelInfo
    from loraplex_common.projections import Projection
    from numpy.typing import NDArray

Tensors = dict[str, "NDArray[np.float32]"]
SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "lora": {"peft_type": "LORA", "r": 4, "lora_alpha": 6},
    "dora": {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_dora": True},
    "lora_bias": {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "lora_bias": True},
    "adalora": {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 6},
    "vera": {"peft_type": "VERA", "r": 4},
    "ia3": {"peft_type": "IA3", "feedforward_modules": ["down_proj"]},
    "shira": {"peft_type": "SHIRA", "r": 2},
    "flora": {"peft_type": "FLORA", "r": 2},
}
TARGETS: Final = ("q_proj", "v_proj", "down_proj")


def method_config(method: str, **changes: Any) -> bytes:
    """Return adapter_config.json of one of `SETTINGS`."""
    fields = SETTINGS[method] | {"target_modules": list(TARGETS), "task_type": "CAUSAL_LM"} | changes
    return json.dumps(fields).encode()


def method_tensors(base: BaseModelInfo, method: str) -> Tensors:
    """Return random tensors under PEFT's names."""
    rng = np.random.default_rng(sum(method.encode()))
    made: Tensors = {}
    adapted = [each for each in base.layers[0] if each.name in TARGETS]
    if method == "vera":
        made["base_model.vera_A"] = _normal(rng, 4, max(each.in_features for each in adapted))
        made["base_model.vera_B"] = _normal(rng, max(each.out_features for each in adapted), 4)
    for layer in range(base.num_layers):
        for each in adapted:
            prefix = f"base_model.model.model.layers.{layer}.{each.path}"
            made |= {f"{prefix}.{slot}": values for slot, values in _slots(method, each, rng).items()}
    return made


def read_method(
    base: BaseModelInfo,
    method: str,
    *,
    change: Callable[[Tensors], Any] | None = None,
    dtype: str = "float32",
    base_dir: Path | None = None,
    **config: Any,
) -> Checkpoint:
    """Read an adapter after ``change`` has edited its tensors and ``config`` its settings."""
    tensors = method_tensors(base, method)
    if change is not None:
        change(tensors)
    return read_checkpoint(method_config(method, **config), safetensors_bytes(tensors, dtype), base, base_dir=base_dir)


def _slots(method: str, projection: Projection, rng: np.random.Generator) -> Tensors:
    inputs, outputs = projection.shape
    a, b = _normal(rng, 4, inputs), _normal(rng, outputs, 4)
    pair = {"lora_A.weight": a, "lora_B.weight": b}
    if method == "dora":
        return pair | {"lora_magnitude_vector": _near_one(rng, outputs)}
    if method == "lora_bias":
        return pair | {"lora_B.bias": _normal(rng, outputs)}
    if method == "adalora":
        return {"lora_A": a, "lora_B": b, "lora_E": _normal(rng, 4, 1)}
    if method == "vera":
        return {"vera_lambda_b": _near_one(rng, outputs), "vera_lambda_d": _near_one(rng, 4)}
    if method == "ia3":
        return {"ia3_l": _near_one(rng, 1, inputs) if projection.name == "down_proj" else _near_one(rng, outputs, 1)}
    if method == "shira":
        count = 2 * (inputs + outputs)
        places = rng.choice(inputs * outputs, count, replace=False)
        indices = np.stack([places // inputs, places % inputs]).astype(np.float32)  # as PEFT does on Windows
        return {"shira_weight": _normal(rng, count), "shira_indices": indices}
    if method == "flora":
        return {"lora_A.weight": a[:2], "lora_B.weight": np.ascontiguousarray(b[:, :2])}
    return pair


def _normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)


def _near_one(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return (1 + 0.2 * rng.standard_normal(shape)).astype(np.float32)
