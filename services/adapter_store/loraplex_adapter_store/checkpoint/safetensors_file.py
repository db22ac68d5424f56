"""A distrustful reader of the safetensors format: every number in the header is checked before it is used.

Format: 8 bytes little-endian length of the header, the header as JSON, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from loraplex_common.adapter_image import from_bfloat16
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError

from loraplex_adapter_store.checkpoint.bounds import (
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_HEADER_VALUES,
    MAX_TENSORS,
    parse_json,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

ITEM_BYTES: Final = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8}
NUMPY_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
INTEGERS: Final = frozenset({"I32", "I64"})
MAX_BFLOAT16: Final = 3.3895313892515355e38  # a larger fp32 value would round to infinity on a bf16 engine
SLICE_ITEMS: Final = 1 << 22
"""Values that are looked at at once, so that a matrix of gigabytes takes some ten megabytes beside the file."""
_BFLOAT16_MAGNITUDE: Final = np.uint16(0x7FFF)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file, its bytes not copied.

    Attributes:
        dtype: ``F32``, ``F16`` or ``BF16``; of indices ``I32`` or ``I64``.
        data: Little-endian, row-major.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview
    _found: list[float] = field(default_factory=list, init=False, repr=False, compare=False)
    """The largest magnitude, once it is known: several checks ask for it, and each look reads all bytes."""

    @classmethod
    def of(cls, name: str, values: NDArray[Any]) -> Tensor:
        """Return a tensor with the bytes of fp32 values or of int32 indices."""
        dtype = "I32" if values.dtype.kind == "i" else "F32"
        raw = np.ascontiguousarray(values, dtype=NUMPY_DTYPES[dtype])
        return cls(name, dtype, values.shape, memoryview(raw.tobytes()))

    @property
    def is_integer(self) -> bool:
        """Whether it holds indices."""
        return self.dtype in INTEGERS

    def values(self) -> NDArray[Any]:
        """Return the values in fp32, exact for every dtype; integers as they are."""
        raw = self.stored()
        if self.is_integer:
            return raw
        return from_bfloat16(raw) if self.dtype == "BF16" else raw.astype(np.float32, copy=False)

    def stored(self) -> NDArray[Any]:
        """Return the values in the type that they have in the file, not copied; of bf16 the bits, uint16."""
        return np.frombuffer(self.data, dtype=NUMPY_DTYPES[self.dtype]).reshape(self.shape)

    def reshaped(self, *shape: int) -> Tensor:
        """Return the same values in another shape."""
        return replace(self, shape=shape)

    def largest(self) -> float:
        """Return the largest magnitude; NaN or infinity if there is one, 0 if all values are 0. It is looked for once."""
        if not self._found:
            self._found.append(self._look_for_largest())
        return self._found[0]

    def unsound(self) -> str:
        """Return how many values an engine cannot compute with, in words; empty if there are none."""
        if self.largest() <= MAX_BFLOAT16:  # NaN compares false
            return ""
        raw = np.frombuffer(self.data, dtype=NUMPY_DTYPES[self.dtype])
        num_nan = num_infinite = num_beyond = 0
        for first in range(0, raw.size, SLICE_ITEMS):
            part = raw[first : first + SLICE_ITEMS]
            part = np.abs(from_bfloat16(part) if self.dtype == "BF16" else part)
            num_nan += int(np.count_nonzero(np.isnan(part)))
            num_infinite += int(np.count_nonzero(np.isinf(part)))
            num_beyond += int(np.count_nonzero(np.isfinite(part) & (part > np.float32(MAX_BFLOAT16))))
        counts = {"NaN": num_nan, "infinite": num_infinite, "beyond bf16's range": num_beyond}
        found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return f"{found} of its {raw.size} values"

    def _look_for_largest(self) -> float:
        raw = np.frombuffer(self.data, dtype=NUMPY_DTYPES[self.dtype])
        found = [_largest(raw[first : first + SLICE_ITEMS], self.dtype) for first in range(0, raw.size, SLICE_ITEMS)]
        return float(np.max(found)) if found else 0.0


def _largest(raw: NDArray[Any], dtype: str) -> float:
    if dtype == "BF16":  # without their sign, bf16 numbers are ordered as their bits are
        return float(from_bfloat16(np.max(raw & _BFLOAT16_MAGNITUDE, keepdims=True))[0])
    return float(np.max(np.abs(raw)))


class Entry(NamedTuple):
    """One tensor of a header; its bytes are the half-open range from ``begin`` to ``end`` behind the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """What a header says, checked.

    Attributes:
        start: Bytes in front of the tensors.
        entries: The tensors, in the order of the header.
    """

    start: int
    entries: tuple[Entry, ...]

    def tensors(self, data: memoryview) -> dict[str, Tensor]:
        """Return the tensors of a file that has this header; not copied."""
        body = data.toreadonly()[self.start :]
        return {name: Tensor(name, dtype, shape, body[begin:end]) for name, dtype, shape, begin, end in self.entries}


def read_tensors(data: bytes | bytearray | memoryview, *, file: str) -> dict[str, Tensor]:
    """Read a whole file from memory.

    Args:
        data: The file; not copied.
        file: Name of the file, for messages.

    Raises:
        AdapterCorruptUploadError: If the file departs from the format; the message says where.
        AdapterIncompatibleError: If a tensor has a dtype other than fp32, fp16, bf16, int32 and int64.
    """
    view = memoryview(data)
    return read_layout(view, len(view), file=file).tensors(view)


def read_layout(head: memoryview, num_bytes: int, *, file: str) -> FileLayout:
    """Read a file's header.

    Args:
        head: The file, or its first bytes with all of the header.
        num_bytes: Bytes of the whole file.
        file: Name of the file, for messages.

    Raises:
        AdapterCorruptUploadError: If the file departs from the format; the message says where.
        AdapterIncompatibleError: If a tensor has a dtype other than fp32, fp16, bf16, int32 and int64.
    """
    header, start = _read_header(head, num_bytes, file)
    num_body_bytes = num_bytes - start
    entries = tuple(
        Entry(name, *_check_entry(name, entry, num_body_bytes, file))
        for name, entry in header.items()
        if name != "__metadata__"
    )
    position = 0
    for begin, end, name in sorted((each.begin, each.end, each.name) for each in entries):
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise AdapterCorruptUploadError(
                f"{file}: tensor {name} {kind} (bytes {begin} to {end}, expected {position})"
            )
        position = end
    if position != num_body_bytes:
        raise AdapterCorruptUploadError(f"{file}: {num_body_bytes - position} bytes after the last tensor")
    return FileLayout(start, entries)


def _read_header(view: memoryview, num_bytes: int, file: str) -> tuple[dict[str, Any], int]:
    if num_bytes < 8:
        raise AdapterCorruptUploadError(f"{file}: {num_bytes} bytes are no safetensors file")
    (length,) = struct.unpack("<Q", view[:8])
    if length > MAX_HEADER_BYTES:
        raise AdapterCorruptUploadError(f"{file}: header of {length} bytes, at most {MAX_HEADER_BYTES} are read")
    if length > num_bytes - 8:
        raise AdapterCorruptUploadError(f"{file}: truncated: header of {length} bytes in a file of {num_bytes}")
    header = parse_json(
        view[8 : 8 + length], what=f"{file}: the header", max_values=MAX_HEADER_VALUES, pairs=_no_duplicates
    )
    if not isinstance(header, dict):
        raise AdapterCorruptUploadError(f"{file}: the header is no JSON object")
    if len(header) > MAX_TENSORS:
        raise AdapterCorruptUploadError(f"{file}: {len(header)} tensors, at most {MAX_TENSORS} are read")
    return header, 8 + int(length)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _check_entry(name: str, entry: Any, num_bytes: int, file: str) -> tuple[str, tuple[int, ...], int, int]:
    where = f"{file}: tensor {name[:200]}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterCorruptUploadError(f"{where}: its header entry needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise AdapterCorruptUploadError(f"{where}: its shape is no list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise AdapterCorruptUploadError(f"{where}: its data_offsets are no pair of positions")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise AdapterIncompatibleError(f"{where}: dtype {str(dtype)[:40]} is not one of {', '.join(ITEM_BYTES)}")
    begin, end = offsets
    if begin > end or end > num_bytes:
        raise AdapterCorruptUploadError(f"{where}: bytes {begin} to {end} lie outside the {num_bytes} bytes of data")
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise AdapterCorruptUploadError(f"{where}: {end - begin} bytes do not hold shape {shape} of {dtype}")
    return dtype, tuple(shape), begin, end
