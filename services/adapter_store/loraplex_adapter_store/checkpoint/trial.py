"""A trial product of an adapter: results for ordinary inputs must stay in the range that engines compute with.

Engines compute in fp32 or bf16, which both end at 3.4e38. An adapter may leave that range in each request although all
its numbers are finite: the next norm squares what a layer adds to the residual stream, scores are products of q and k,
and the MLP multiplies gate by up. So each module is multiplied with a few inputs as a norm makes them (mean square 1),
and the largest magnitudes are combined as a layer does. It reads each matrix once and costs about as much as the
checksum.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_common.errors import AdapterCorruptUploadError

from loraplex_adapter_store.checkpoint.safetensors_file import MAX_BFLOAT16

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loraplex_common.base_model import BaseModelInfo

    from loraplex_adapter_store.checkpoint.reader import Module

NUM_INPUTS: Final = 4
BASE_GAIN: Final = 64.0
"""Largest gain that the base model's own projections and norms may have; ordinary ones stay far below."""


def check_trial(modules: Iterable[Module], base: BaseModelInfo) -> None:
    """Refuse an adapter that makes the forward pass leave the range of fp32 and bf16.

    Raises:
        AdapterCorruptUploadError: If it does so; the message names the module that contributes most.
    """
    layers: dict[int, dict[str, tuple[float, Module]]] = {}
    for module in modules:
        layers.setdefault(module.layer, {})[module.projection] = gain(module), module
    # The next norm sums the squares of what all layers have added.
    residual = math.sqrt(MAX_BFLOAT16 / base.hidden_size) / base.num_layers
    paths = (
        (("q_proj", "k_proj"), MAX_BFLOAT16 / base.hidden_size),
        (("v_proj", "o_proj"), residual),
        (("gate_proj", "up_proj", "down_proj"), residual),
    )
    for found in layers.values():
        for projections, limit in paths:
            gains = [found[name] for name in projections if name in found]
            product = math.prod([BASE_GAIN + value for value, _ in gains], start=1.0)
            product *= BASE_GAIN ** (len(projections) - len(gains))
            if gains and not product <= limit:  # NaN compares false
                raise _overflow(*max(gains, key=lambda each: each[0]))


def gain(module: Module) -> float:
    """Return the largest magnitude of a module's output for inputs of mean square 1; infinity if it leaves fp32."""
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((module.lora_a.shape[1], NUM_INPUTS), dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        outputs = module.lora_b.values() @ (module.lora_a.values() @ inputs)
        largest = float(np.max(np.abs(outputs))) * abs(module.scaling)
    return largest if math.isfinite(largest) else math.inf


def _overflow(value: float, module: Module) -> AdapterCorruptUploadError:
    return AdapterCorruptUploadError(
        f"layer {module.layer}, {module.projection}: it makes values up to {value:.2g} of inputs of size 1 (scaling "
        f"{module.scaling:g}), so a forward pass leaves the range of fp32 and bf16 and each request would fail; check lora_alpha "
        "and the training run"
    )
