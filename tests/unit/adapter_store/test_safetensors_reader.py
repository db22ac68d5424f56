"""The safetensors reader believes nothing that a header says."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_adapter_store.checkpoint.bounds import MAX_HEADER_BYTES
from loraplex_adapter_store.checkpoint.safetensors_file import read_tensors
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError
from safetensors.numpy import load
from support.safetensors_files import assemble, safetensors_bytes

ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=4),
    dtype=st.sampled_from(["float32", "float16"]),
    seed=st.integers(0, 9),
)
def test_sound_files_read_as_the_reference_library_reads_them(shapes: list[list[int]], dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = {f"t{i}": rng.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)}
    data = safetensors_bytes(tensors, dtype)

    found = read_tensors(data, file="x")

    for name, expected in load(data).items():
        np.testing.assert_array_equal(found[name].values(), expected.astype(np.float32))
    assert set(found) == set(tensors)


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        ({"a": ENTRY | {"data_offsets": [0, 17]}}, b"\0" * 17, "do not hold shape"),
        ({"a": ENTRY}, b"\0" * 15, "outside"),
        ({"a": ENTRY | {"data_offsets": [-16, 0]}}, b"\0" * 16, "data_offsets"),
        ({"a": ENTRY | {"data_offsets": [16, 0]}}, b"\0" * 16, "outside"),
        ({"a": ENTRY | {"data_offsets": [0.0, 16.0]}}, b"\0" * 16, "data_offsets"),
        ({"a": ENTRY | {"data_offsets": [0]}}, b"\0" * 16, "data_offsets"),
        ({"a": ENTRY | {"shape": [-2, -2]}}, b"\0" * 16, "shape"),
        ({"a": ENTRY | {"shape": [True, 4]}}, b"\0" * 16, "shape"),
        ({"a": ENTRY | {"shape": [1 << 63, 1 << 63]}}, b"\0" * 16, "shape"),
        ({"a": ENTRY | {"shape": 4}}, b"\0" * 16, "shape"),
        ({"a": ENTRY | {"extra": 1}}, b"\0" * 16, "dtype, shape and data_offsets"),
        ({"a": "x"}, b"\0" * 16, "dtype, shape and data_offsets"),
        ({"a": ENTRY, "b": ENTRY}, b"\0" * 16, "overlaps"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [20, 36]}}, b"\0" * 36, "gap"),
        ({"a": ENTRY}, b"\0" * 20, "after the last tensor"),
        (b'{"a":1,"a":2}', b"", "twice"),
        (b"[]", b"", "no JSON object"),
        (b"nonsense", b"", "header is no JSON"),
        (b"\xff\xff", b"", "header is no JSON"),
        (b"[" * 50_000, b"", "header is no JSON"),
    ],
)
def test_a_lying_header_is_refused(header: Any, data: bytes, match: str) -> None:
    with pytest.raises(AdapterCorruptUploadError, match=match):
        read_tensors(assemble(header, data), file="adapter_model.safetensors")


@pytest.mark.parametrize("dtype", ["F64", "I8", "F8_E4M3", "BOOL", 5, None, ["F32"]])
def test_other_dtypes_are_refused_by_name(dtype: Any) -> None:
    with pytest.raises((AdapterIncompatibleError, AdapterCorruptUploadError), match="dtype"):
        read_tensors(assemble({"a": ENTRY | {"dtype": dtype}}, b"\0" * 16), file="x")


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_an_oversized_header_is_refused_unread(length: int) -> None:
    with pytest.raises(AdapterCorruptUploadError, match="header of"):
        read_tensors(struct.pack("<Q", length) + b"{}", file="x")


def test_every_truncation_is_refused() -> None:
    data = safetensors_bytes({"a": np.ones((2, 2), dtype=np.float32)}, "float32")
    for length in range(len(data)):
        with pytest.raises(AdapterCorruptUploadError):
            read_tensors(data[:length], file="x")


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 150), value=st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused_but_never_crashes(position: int, value: int) -> None:
    data = bytearray(safetensors_bytes({"a": np.ones((2, 2), dtype=np.float32)}, "float32"))
    data[position % len(data)] = value
    with contextlib.suppress(AdapterCorruptUploadError, AdapterIncompatibleError):
        read_tensors(data, file="x")
