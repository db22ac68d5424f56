"""A trial product of an adapter: results for ordinary inputs must stay in the range that engines compute with.

Engines compute in fp32 or bf16, which both end at 3.4e38. An adapter may leave that range in each request although all
its numbers are finite: the next norm squares what a layer adds to the residual stream, scores are products of q and k,
and the MLP multiplies gate by up. So each module is multiplied with a few inputs as a norm makes them (mean square 1),
and the largest magnitudes are combined as a layer does. It reads each matrix once and costs about as much as the
checksum. DoRA's magnitudes are a bound by themselves: they are the norms of the rows of the adapted weights.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_common.errors import AdapterCorruptUploadError
from loraplex_common.flora import FLORA
from loraplex_common.image_geometry import OUTSIDE_NAMES
from loraplex_common.low_rank import LOW_RANK, LowRank
from loraplex_common.sparse_delta import SPARSE_DELTA, SparseDelta
from loraplex_common.token_rows import ROWS
from loraplex_common.vectors import BIAS, IN_VECTOR, OUT_VECTOR, OutVector

from loraplex_adapter_store.checkpoint.safetensors_file import MAX_BFLOAT16

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from loraplex_common.base_model import BaseModelInfo
    from numpy.typing import NDArray

    from loraplex_adapter_store.checkpoint.parts import Module, PartTensors

NUM_INPUTS: Final = 4
BASE_GAIN: Final = 64.0
"""Largest gain that the base model's own projections and norms may have; ordinary ones stay far below."""

FUSED: Final = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What a module that is several projections in one is taken for."""

MAX_NORM: Final = 1e18
"""Largest output before DoRA's division by norms, whose squares engines sum in fp32."""


def check_trial(modules: Iterable[Module], base: BaseModelInfo) -> None:
    """Refuse an adapter that makes the forward pass leave the range of fp32 and bf16.

    Raises:
        AdapterCorruptUploadError: If it does so; the message names the module that contributes most.
    """
    layers: dict[int, dict[str, tuple[float, Module]]] = {}
    for module in modules:
        size = output_size(module)
        for name in FUSED.get(module.projection, (module.projection,)):
            layers.setdefault(module.layer, {})[name] = size, module
    # The next norm sums the squares of what all layers and the embedding have added.
    residual = math.sqrt(MAX_BFLOAT16 / base.hidden_size) / (base.num_layers + 1)
    paths = (
        (("q_proj", "k_proj"), MAX_BFLOAT16 / base.hidden_size),
        (("v_proj", "o_proj"), residual),
        (("gate_proj", "up_proj", "down_proj"), residual),
        (("embed_tokens",), residual),
        (("lm_head",), MAX_BFLOAT16),
    )
    for found in layers.values():
        for projections, limit in paths:
            sizes = [found[name] for name in projections if name in found]
            product = math.prod([value for value, _ in sizes], start=1.0)
            product *= BASE_GAIN ** (len(projections) - len(sizes))
            if sizes and not product <= limit:  # NaN compares false
                raise _overflow(*max(sizes, key=lambda each: each[0]))


def output_size(module: Module) -> float:
    """Return the largest magnitude of a module's output for inputs of mean square 1, the base's included.

    Returns:
        What the order of ADR 26 makes of `BASE_GAIN` and the trial products; infinity if it leaves fp32.
    """
    tensors = {part.kind: part for part in module.parts}
    if module.projection in OUTSIDE_NAMES:
        return _outside_size(module, tensors)
    with np.errstate(over="ignore", invalid="ignore"):
        size = BASE_GAIN * _largest(tensors.get(IN_VECTOR))
        if (flora := tensors.get(FLORA)) is not None:
            a, b = (np.abs(each.values()) for each in flora.tensors)
            size = BASE_GAIN * float(a.max(axis=1) @ b.max(axis=0))
        if (pair := tensors.get(LOW_RANK)) is not None:
            size += _pair_gain(pair)
        if (out := tensors.get(OUT_VECTOR)) is not None:
            assert isinstance(out.part, OutVector)
            if out.part.is_magnitude:  # each row of the weights has this norm, and the input sqrt(in_features)
                assert pair is not None
                size = _largest(out) * math.sqrt(pair.tensors[0].shape[1]) if size <= MAX_NORM else math.inf
            else:
                size *= _largest(out)
        size += _sparse_gain(tensors.get(SPARSE_DELTA))
        size += _largest(tensors.get(BIAS), absent=0.0)
    return size if math.isfinite(size) else math.inf


def _outside_size(module: Module, tensors: Mapping[str, PartTensors]) -> float:
    """Return an upper bound of the values that the embedding gives, or lm_head of inputs of mean square 1."""
    size = BASE_GAIN
    with np.errstate(over="ignore", invalid="ignore"):
        if (pair := tensors.get(LOW_RANK)) is not None and module.projection == "lm_head":
            size += _pair_gain(pair)
        elif pair is not None:  # its inputs are tokens, each a column of A
            a, b = pair.tensors
            size += abs(module.scaling) * module.rank * a.largest() * b.largest()
        if (rows := tensors.get(ROWS)) is not None:
            width = rows.tensors[1].shape[1] if module.projection == "lm_head" else 1
            size = max(size, rows.tensors[1].largest() * math.sqrt(width))
    return size if math.isfinite(size) else math.inf


def _largest(part: PartTensors | None, absent: float = 1.0) -> float:
    return absent if part is None else part.tensors[0].largest()


@functools.lru_cache(maxsize=16)
def _inputs(columns: int) -> NDArray[np.float32]:
    inputs = np.random.default_rng(0).standard_normal((columns, NUM_INPUTS), dtype=np.float32)
    inputs.setflags(write=False)  # they serve all modules of this many inputs
    return inputs


def _pair_gain(pair: PartTensors) -> float:
    a, b = pair.tensors
    assert isinstance(pair.part, LowRank)
    outputs = b.values() @ (a.values() @ _inputs(a.shape[1]))
    return float(np.max(np.abs(outputs))) * abs(pair.part.scaling)


def _sparse_gain(delta: PartTensors | None) -> float:
    if delta is None:
        return 0.0
    values, columns, starts = (each.values() for each in delta.tensors)
    assert isinstance(delta.part, SparseDelta)
    products = values[:, None] * _inputs(int(columns.max()) + 1)[columns]
    rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    sums = [np.bincount(rows, weights=products[:, index]) for index in range(NUM_INPUTS)]
    return max(float(np.max(np.abs(each))) for each in sums) * abs(delta.part.scaling)


def _overflow(value: float, module: Module) -> AdapterCorruptUploadError:
    pair = module.of_kind(LOW_RANK)
    scaling = f" (scaling {module.scaling:g})" if pair is not None else ""
    check = "lora_alpha and the training run" if pair is not None else "the training run"
    return AdapterCorruptUploadError(
        f"layer {module.layer}, {module.projection}: it makes values up to {value:.2g} of inputs of size 1{scaling}, so a "
        f"forward pass leaves the range of fp32 and bf16 and each request would fail; check {check}"
    )
