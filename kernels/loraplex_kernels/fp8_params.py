"""ctypes mirrors of the parameter structs of kernels that quantise to e4m3, and that multiply it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_uint64, c_void_p
from typing import Any, ClassVar

_Fields = Sequence[tuple[str, type[Any]]]


class Quantised(ctypes.Structure):
    """csrc/pointwise/fp8.cuh."""

    _fields_: ClassVar[_Fields] = [
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("scale_stride", c_int),
        ("reserved", c_int),
    ]


class RmsNormFp8Params(ctypes.Structure):
    """csrc/pointwise/rms_norm_fp8.cu."""

    _fields_: ClassVar[_Fields] = [
        ("x", c_void_p),
        ("residual", c_void_p),
        ("weight", c_void_p),
        ("out", c_void_p),
        ("quantised", Quantised),
        ("eps", c_float),
        ("reserved", c_int),
    ]


class SiluMulFp8Params(ctypes.Structure):
    """csrc/pointwise/silu_mul_fp8.cu and csrc/pointwise/silu_mul_fp8_many.cu."""

    _fields_: ClassVar[_Fields] = [
        ("gate_up", c_void_p),
        ("out", c_void_p),
        ("delta", c_void_p),
        ("quantised", Quantised),
    ]


class QuantiseFp8Params(ctypes.Structure):
    """csrc/pointwise/quantise_fp8.cu."""

    _fields_: ClassVar[_Fields] = [("x", c_void_p), ("maxima", c_void_p), ("quantised", Quantised)]


class TensorMap(ctypes.Structure):
    """csrc/products/tma.cuh."""

    _fields_: ClassVar[_Fields] = [("words", c_uint64 * 16)]


class Fp8ProductParams(ctypes.Structure):
    """csrc/products/fp8_product.cu."""

    _fields_: ClassVar[_Fields] = [
        ("weight", TensorMap),
        ("x", TensorMap),
        ("weight_scales", c_void_p),
        ("x_scales", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("rows", c_int),
        ("outputs", c_int),
        ("steps", c_int),
        ("x_scale_stride", c_int),
        ("accumulates", c_int),
        ("reserved", c_int),
        ("maxima", c_void_p),
    ]
