"""As `params`: of the kernels of rows of tokens."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any, ClassVar

from loraplex_kernels.params import LoraTables, PartTables

_Fields = Sequence[tuple[str, type[Any]]]


class EmbedRowsParams(ctypes.Structure):
    """csrc/lora/embed_rows.cu."""

    _fields_: ClassVar[_Fields] = [
        ("lora", LoraTables),
        ("rows", c_void_p),
        ("tokens", c_void_p),
        ("adapters", c_void_p),
        ("ids", c_void_p),
        ("slots", c_void_p),
        ("last_sampled", c_void_p),
        ("table", c_void_p),
        ("out", c_void_p),
        ("h", c_void_p),
        ("h_stride", c_int),
        ("vocab", c_int),
    ]


class HeadRowsParams(ctypes.Structure):
    """csrc/lora/head_rows.cu."""

    _fields_: ClassVar[_Fields] = [
        ("lora", LoraTables),
        ("x", c_void_p),
        ("logits", c_void_p),
        ("stride", c_int64),
        ("columns", c_int),
        ("width", c_int),
    ]


class BranchNormParams(ctypes.Structure):
    """csrc/pointwise/branch_norm.cu."""

    _fields_: ClassVar[_Fields] = [
        ("x", c_void_p),
        ("residual", c_void_p),
        ("after", c_void_p),
        ("before", c_void_p),
        ("out", c_void_p),
        ("rows", c_void_p),
        ("eps", c_float),
        ("multiplier", c_float),
    ]


class SoftcapParams(ctypes.Structure):
    """csrc/pointwise/softcap.cu."""

    _fields_: ClassVar[_Fields] = [
        ("logits", c_void_p),
        ("out", c_void_p),
        ("stride", c_int64),
        ("width", c_int),
        ("vocab", c_int),
        ("cap", c_float),
        ("reserved", c_int),
    ]


class FinishNormParams(ctypes.Structure):
    """csrc/lora/finish_norm.cu."""

    _fields_: ClassVar[_Fields] = [
        ("tables", PartTables),
        ("scales", c_void_p),
        ("biases", c_void_p),
        ("y", c_void_p),
        ("scale", c_void_p),
        ("base_bias", c_void_p),
        ("residual", c_void_p),
        ("weight", c_void_p),
        ("out", c_void_p),
        ("eps", c_float),
        ("reserved", c_int),
    ]


class GreedyParams(ctypes.Structure):
    """csrc/sampling/greedy.cu."""

    _fields_: ClassVar[_Fields] = [
        ("logits", c_void_p),
        ("slots", c_void_p),
        ("drawn", c_void_p),
        ("last_sampled", c_void_p),
        ("vocab", c_int),
        ("stride", c_int),
    ]
