"""Writes safetensors files of any dtype with numpy alone, sound ones and broken ones."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
from loraplex_common.adapter_image import to_bfloat16

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def encode(values: NDArray[np.float32], dtype: str) -> bytes:
    """Return values rounded to dtype, little-endian, row-major."""
    if dtype == "bfloat16":
        return to_bfloat16(values).tobytes()
    return np.ascontiguousarray(values, dtype=dtype).tobytes()


def safetensors_bytes(
    tensors: Mapping[str, NDArray[np.float32]], dtype: str, metadata: dict[str, str] | None = None
) -> bytes:
    """Return a safetensors file that holds the tensors in the given dtype."""
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    parts: list[bytes] = []
    position = 0
    for name, values in tensors.items():
        data = encode(values, dtype)
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(values.shape),
            "data_offsets": [position, position + len(data)],
        }
        parts.append(data)
        position += len(data)
    return assemble(header, b"".join(parts))


def assemble(header: Mapping[str, Any] | bytes, data: bytes) -> bytes:
    """Join a header, as JSON or raw bytes, and data; nothing is checked, so that tests can write invalid files."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + data


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[np.float32]], dtype: str) -> None:
    """Write `safetensors_bytes` to a file."""
    path.write_bytes(safetensors_bytes(tensors, dtype))
