"""What an H100 allows at best: bytes at its measured read rate, arithmetic at cuBLAS's best rate.

Measured ceilings of one H100 80GB HBM3 (baselines): read-only sum 3.056 TB/s, bf16 GEMM of 8192^3 787 TFLOP/s.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_client.workload import NO_ADAPTER
from loraplex_common.adapter_image import ITEM_BYTES

if TYPE_CHECKING:
    from loraplex_client.workload import Trace

    from loraplex_bench.shapes import AdapterFamily, Shape

READ_BYTES_PER_S: Final = 3.056e12
FLOPS_PER_S: Final = 787e12
FP8_SPEED: Final = 2
"""How many times as fast as bf16's arithmetic that of e4m3 is, by the datasheet."""


def dense_params(shape: Shape) -> int:
    """Return the parameters that every token multiplies with, the vocabulary's not included."""
    info = shape.info
    heads = (info.num_heads + 2 * info.num_kv_heads) * info.head_dim
    per_layer = info.hidden_size * (heads + info.num_heads * info.head_dim + 3 * info.intermediate_size)
    return info.num_layers * per_layer


def step_weight_bytes(shape: Shape) -> int:
    """Return the bytes of weights that a decode step reads."""
    item = ITEM_BYTES[shape.dtype]
    return dense_params(shape) * (1 if shape.is_fp8 else item) + shape.info.hidden_size * shape.info.vocab_size * item


def kv_bytes_per_token(shape: Shape) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return shape.pool.page_bytes // shape.pool.block_tokens


def adapter_bytes(shape: Shape, family: AdapterFamily, index: int) -> int:
    """Return the bytes of an adapter's weights, without padding."""
    spec = family.spec(shape, index)
    sizes = (sum(shape.geometry.local_shape(0, m.projection)) * m.rank for m in spec.modules)
    return sum(sizes) * ITEM_BYTES[shape.dtype]


def burst_floor_s(shape: Shape, family: AdapterFamily, trace: Trace, max_num_seqs: int) -> float:
    """Return the least time in which a burst of equal requests can be computed.

    Prompts cost arithmetic. ``max_num_seqs`` bounds the number of decode steps from below. Each step reads the weights
    and the adapters in use once; each token reads the keys and values before it.
    """
    prompt, output = trace.prompt_tokens.astype(np.int64), trace.output_tokens.astype(np.int64)
    tokens = int(prompt.sum())
    attention = 2 * shape.info.num_layers * shape.info.num_heads * shape.info.head_dim * int((prompt**2).sum())
    products = 2 * dense_params(shape) * tokens / (FP8_SPEED if shape.is_fp8 else 1)
    prefill_s = (products + attention) / FLOPS_PER_S
    waves = math.ceil(len(trace) / max_num_seqs)
    steps = waves * int(output.max() - 1)
    used = np.unique(trace.adapter[trace.adapter != NO_ADAPTER])
    mean_bytes = (
        float(np.mean([adapter_bytes(shape, family, int(i)) for i in used[: len(family.ranks)]])) if len(used) else 0.0
    )
    adapters = mean_bytes * min(len(used), math.ceil(len(trace) / waves))
    contexts = int(((output - 1) * prompt + (output - 1) * output // 2).sum())
    read = steps * (step_weight_bytes(shape) + adapters) + contexts * kv_bytes_per_token(shape)
    return prefill_s + read / READ_BYTES_PER_S


def decode_floor_s(shape: Shape, num_rows: int, context: int) -> float:
    """Return the least time of a decode step without adapters: bytes of the weights, and of keys and values of each row."""
    return (step_weight_bytes(shape) + num_rows * context * kv_bytes_per_token(shape)) / READ_BYTES_PER_S


def token_floor_s(shape: Shape) -> float:
    """Return the least time of a decode step: its weights' bytes."""
    return step_weight_bytes(shape) / READ_BYTES_PER_S
