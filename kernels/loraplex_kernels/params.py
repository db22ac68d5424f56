"""ctypes mirrors of the kernels' parameter structs; each ``.cu`` asserts the size its mirror must have."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any, ClassVar

_Fields = Sequence[tuple[str, type[Any]]]


class LoraTables(ctypes.Structure):
    """csrc/lora/table.cuh."""

    _fields_: ClassVar[_Fields] = [
        ("pool", c_void_p),
        ("tiles", c_void_p),
        ("entries", c_void_p),
        ("entry_stride", c_int64),
        ("groups", c_void_p),
        ("items", c_void_p),
        ("range", c_void_p),
    ]


class ExpandParams(ctypes.Structure):
    """csrc/lora/expand.cuh."""

    _fields_: ClassVar[_Fields] = [
        ("h", c_void_p),
        ("scale", c_void_p),
        ("h_plane", c_int64),
        ("h_stride", c_int),
        ("num_planes", c_int),
        ("slice_begin", c_int * 4),
    ]


class RopeParams(ctypes.Structure):
    """csrc/attention/rope_kv.cu."""

    _fields_: ClassVar[_Fields] = [
        ("qkv", c_void_p),
        ("rotary", c_void_p),
        ("positions", c_void_p),
        ("kv_slots", c_void_p),
        ("pool", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("delta", c_void_p),
        ("page_bytes", c_int64),
        ("layer_offset", c_int64),
        ("num_heads", c_int),
        ("num_kv_heads", c_int),
        ("block_tokens", c_int),
        ("norm_eps", c_float),
        ("query_scale", c_void_p),
    ]


class PagedKv(ctypes.Structure):
    """csrc/attention/paged_kv.cuh."""

    _fields_: ClassVar[_Fields] = [
        ("pool", c_void_p),
        ("block_tables", c_void_p),
        ("page_bytes", c_int64),
        ("layer_offset", c_int64),
        ("table_stride", c_int),
        ("block_shift", c_int),
        ("num_heads", c_int),
        ("num_kv_heads", c_int),
        ("window", c_int),
        ("scale", c_float),
    ]


class RmsNormParams(ctypes.Structure):
    """csrc/pointwise/rms_norm.cu."""

    _fields_: ClassVar[_Fields] = [
        ("x", c_void_p),
        ("residual", c_void_p),
        ("weight", c_void_p),
        ("out", c_void_p),
        ("rows", c_void_p),
        ("eps", c_float),
        ("num_rows", c_int),
    ]


class SiluMulParams(ctypes.Structure):
    """csrc/pointwise/silu_mul.cu."""

    _fields_: ClassVar[_Fields] = [("gate_up", c_void_p), ("out", c_void_p), ("delta", c_void_p)]


class EmbeddingParams(ctypes.Structure):
    """csrc/pointwise/embedding.cu."""

    _fields_: ClassVar[_Fields] = [
        ("table", c_void_p),
        ("ids", c_void_p),
        ("slots", c_void_p),
        ("last_sampled", c_void_p),
        ("out", c_void_p),
        ("vocab", c_int),
        ("multiplier", c_float),
    ]


class ShrinkParams(ctypes.Structure):
    """csrc/lora/shrink.cu."""

    _fields_: ClassVar[_Fields] = [
        ("lora", LoraTables),
        ("x", c_void_p),
        ("h", c_void_p),
        ("h_plane", c_int64),
        ("h_stride", c_int),
        ("columns", c_int),
        ("plane_columns", c_int),
        ("reserved", c_int),
    ]


class ExpandAddParams(ctypes.Structure):
    """csrc/lora/expand.cu."""

    _fields_: ClassVar[_Fields] = [
        ("lora", LoraTables),
        ("expand", ExpandParams),
        ("y", c_void_p),
        ("delta", c_void_p),
        ("y_stride", c_int64),
        ("accumulates", c_int),
        ("reserved", c_int),
    ]


class ExpandChainParams(ExpandAddParams):
    """csrc/lora/expand_chain.cu."""


class PartTables(ctypes.Structure):
    """csrc/lora/parts.cuh."""

    _fields_: ClassVar[_Fields] = [
        ("pool", c_void_p),
        ("tiles", c_void_p),
        ("adapters", c_void_p),
        ("entry_stride", c_int64),
    ]


class FinishParams(ctypes.Structure):
    """csrc/lora/finish.cu."""

    _fields_: ClassVar[_Fields] = [
        ("tables", PartTables),
        ("scales", c_void_p),
        ("biases", c_void_p),
        ("y", c_void_p),
        ("scale", c_void_p),
        ("base_bias", c_void_p),
        ("slice_begin", c_int * 4),
        ("width", c_int),
        ("reserved", c_int),
    ]


class ScaleInputParams(ctypes.Structure):
    """csrc/lora/scale_input.cu."""

    _fields_: ClassVar[_Fields] = [
        ("tables", PartTables),
        ("entries", c_void_p),
        ("x", c_void_p),
        ("columns", c_int),
        ("reserved", c_int),
    ]


class SparseParams(ctypes.Structure):
    """csrc/lora/sparse.cu."""

    _fields_: ClassVar[_Fields] = [
        ("lora", LoraTables),
        ("x", c_void_p),
        ("y", c_void_p),
        ("scale", c_void_p),
        ("slice_begin", c_int * 4),
        ("width", c_int),
        ("value_shift", c_int),
        ("column_shift", c_int),
        ("start_shift", c_int),
    ]


class AttentionDecodeParams(ctypes.Structure):
    """csrc/attention/decode.cu."""

    _fields_: ClassVar[_Fields] = [
        ("kv", PagedKv),
        ("q", c_void_p),
        ("out", c_void_p),
        ("context_lens", c_void_p),
        ("partial_out", c_void_p),
        ("partial_stats", c_void_p),
        ("arrivals", c_void_p),
        ("q_stride", c_int64),
        ("min_split", c_int),
        ("reserved", c_int),
    ]


class AttentionScalarParams(ctypes.Structure):
    """csrc/attention/scalar.cu."""

    _fields_: ClassVar[_Fields] = [
        ("kv", PagedKv),
        ("q", c_void_p),
        ("out", c_void_p),
        ("sequences", c_void_p),
        ("positions", c_void_p),
        ("q_stride", c_int64),
    ]


class AttentionPrefillParams(ctypes.Structure):
    """csrc/attention/prefill.cu."""

    _fields_: ClassVar[_Fields] = [
        ("kv", PagedKv),
        ("q", c_void_p),
        ("out", c_void_p),
        ("tiles", c_void_p),
        ("q_stride", c_int64),
    ]


class PrefillParams(ctypes.Structure):
    """csrc/lora/prefill.cu."""

    _fields_: ClassVar[_Fields] = [
        ("lora", LoraTables),
        ("x", c_void_p),
        ("scale", c_void_p),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("columns", c_int),
        ("log_shares", c_int),
        ("slice_begin", c_int * 4),
    ]


class SampleParams(ctypes.Structure):
    """csrc/sampling/sample.cu."""

    _fields_: ClassVar[_Fields] = [
        ("logits", c_void_p),
        ("rows", c_void_p),
        ("edits", c_void_p),
        ("edit_bits", c_void_p),
        ("counts", c_void_p),
        ("masks", c_void_p),
        ("drawn", c_void_p),
        ("last_sampled", c_void_p),
        ("report", c_void_p),
        ("vocab", c_int),
        ("max_edits", c_int),
        ("report_top", c_int),
        ("stride", c_int),
    ]
