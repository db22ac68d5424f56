"""As `params`: of the kernels of rows of tokens."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p
from typing import Any, ClassVar

from loraplex_kernels.params import LoraTables

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
