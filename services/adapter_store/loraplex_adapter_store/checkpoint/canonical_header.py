"""The header of a canonical form: which tensors it has, where they lie, and how they make up modules.

Adapters of one base that are trained alike have equal headers, byte for byte: what one says is kept for the next, as a header of
448 tensors takes 4 ms to read, in which no other thread of the interpreter runs.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loraplex_adapter_store.checkpoint.canonical_parts import module_names, module_of, name_of
from loraplex_adapter_store.checkpoint.safetensors_file import FileLayout, read_layout

LENGTH_BYTES: Final = 8
_NUM_KEPT: Final = 16
_LARGEST_KEPT_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class CanonicalHeader:
    """What the header of a canonical form says; shared by all forms that have the same, so that it must not be changed.

    Attributes:
        layout: Its tensors.
        names: What `module_names` gives.
        modules: Layer -> projection and fields of each module, in the order of the config.
        bytes_needed: Layer -> how many bytes must have arrived before the layer can be read, in the order of layers.
    """

    layout: FileLayout
    names: Mapping[tuple[int, str], str]
    base_fingerprint: str
    is_activated: bool
    modules: Mapping[int, Sequence[tuple[str, Any]]]
    bytes_needed: Mapping[int, int]


def header_bytes(head: bytes | bytearray | memoryview) -> int:
    """Return how many bytes in front of the tensors a canonical form has, from its first `LENGTH_BYTES`."""
    (length,) = struct.unpack_from("<Q", head)
    return LENGTH_BYTES + int(length)


def read_header(data: memoryview) -> CanonicalHeader:
    """Read a header; the bytes behind it may still be on their way.

    Args:
        data: Room for all of the form.

    Raises:
        AdapterCorruptUploadError: If the header is none of a safetensors file.
    """
    head = bytes(data[: header_bytes(data)])
    read = _read if len(head) <= _LARGEST_KEPT_BYTES else _read.__wrapped__
    return read(head, len(data))


def read_config(head: bytes) -> dict[str, Any]:
    """Return the canonical config, from the `header_bytes` in front of the tensors."""
    config: dict[str, Any] = json.loads(json.loads(head[LENGTH_BYTES:])["__metadata__"]["loraplex"])
    return config


@functools.lru_cache(maxsize=_NUM_KEPT)
def _read(head: bytes, num_bytes: int) -> CanonicalHeader:
    config = read_config(head)
    layout = read_layout(memoryview(head), num_bytes, file="canonical form")
    names = module_names(entry.name for entry in layout.entries)
    modules: dict[int, list[tuple[str, Any]]] = {}
    for layer, projection, fields in config["modules"]:
        modules.setdefault(layer, []).append((projection, fields))
    return CanonicalHeader(
        layout=layout,
        names=names,
        base_fingerprint=config["base"],
        is_activated=bool(config.get("text_parts", {}).get("invocation_token_ids")),
        modules=modules,
        bytes_needed=_bytes_needed(layout, names, modules),
    )


def _bytes_needed(
    layout: FileLayout,
    names: Mapping[tuple[int, str], str],
    modules: Mapping[int, Sequence[tuple[str, Any]]],
) -> dict[int, int]:
    ends: dict[str | None, int] = {}
    for entry in sorted(layout.entries, key=lambda entry: entry.end):
        ends[module_of(entry.name)] = layout.start + entry.end
    shared = ends.get(None, layout.start)
    return {
        layer: max(shared, *(ends[name_of(names, layer, projection)] for projection, _ in found))
        for layer, found in modules.items()
    }
