"""ctypes mirrors of the parameter structs of FLoRA's kernels, as in `params`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_void_p
from typing import Any, ClassVar

from loraplex_kernels.params import PartTables

_Fields = Sequence[tuple[str, type[Any]]]


class FloraScaleParams(ctypes.Structure):
    """csrc/lora/flora_scale.cu."""

    _fields_: ClassVar[_Fields] = [
        ("tables", PartTables),
        ("entries", c_void_p),
        ("rows", c_void_p),
        ("x", c_void_p),
        ("out", c_void_p),
        ("columns", c_int),
        ("slice", c_int),
    ]


class FloraSumParams(ctypes.Structure):
    """csrc/lora/flora_sum.cu."""

    _fields_: ClassVar[_Fields] = [
        ("tables", PartTables),
        ("entries", c_void_p),
        ("rows", c_void_p),
        ("products", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("outputs", c_int),
        ("width", c_int),
        ("slice", c_int),
        ("reserved", c_int),
    ]
