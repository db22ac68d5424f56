"""The canonical form: one safetensors file whose sha256 is the adapter's revision.

Its metadata holds the canonical config, with only the facts that decide what is computed: the base model's fingerprint,
each module's scaling or parts, and the text parts if there are any. Tensors keep their own dtypes; those of a pair keep
PEFT's names, those of other parts are called by kind (`canonical_parts`). They are sorted by name, keys are sorted, and
only the header is padded, to 8 bytes. So equal weights from differently written checkpoints have equal revisions. What
modules share is written once: of VeRA, each has two vectors, and its pair is multiplied out when it is read.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec, Tensors
from loraplex_common.errors import AdapterCorruptError
from loraplex_common.text_parts import TextParts

from loraplex_adapter_store.checkpoint.canonical_header import header_bytes, read_config, read_header
from loraplex_adapter_store.checkpoint.canonical_parts import (
    module_fields,
    name_of,
    named_tensors,
    read_parts,
)
from loraplex_adapter_store.import_notes import ImportNotes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from loraplex_common.part_kind import Arrays, Part

    from loraplex_adapter_store.checkpoint.reader import Checkpoint

FORMAT: Final = 1
FORMAT_OF_PARTS: Final = 2
"""Format of an adapter with a module that is more than a pair of matrices."""
CHUNK_BYTES: Final = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class CanonicalForm:
    """An adapter ready to be stored; the tensors' bytes are views of the checkpoint's.

    Attributes:
        revision: sha256 of the whole file, 64 hex digits.
        spec: The facts that engines build their tables from.
        pieces: The file's pieces in order.
        warnings: The checkpoint's warnings; they are no part of the file.
        notes: What is kept of the import beside the file.
    """

    revision: str
    base_fingerprint: str
    spec: AdapterSpec
    num_parameters: int
    num_bytes: int
    pieces: tuple[memoryview, ...]
    text_parts: TextParts
    warnings: tuple[str, ...] = ()
    notes: ImportNotes | None = None

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yield the file in chunks of ``chunk_bytes``; only the last may be shorter."""
        return map(b"".join, self.chunk_parts(chunk_bytes))

    def chunk_parts(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[list[memoryview]]:
        """Yield the chunks of `chunks`, none of them copied: each as the views that it consists of, in order."""
        parts: list[memoryview] = []
        room = chunk_bytes
        for piece in self.pieces:
            position = 0
            while position < len(piece):
                parts.append(piece[position : position + room])
                position += len(parts[-1])
                room -= len(parts[-1])
                if not room:
                    yield parts
                    parts, room = [], chunk_bytes
        if parts:
            yield parts


@dataclass(frozen=True, slots=True)
class CanonicalAdapter:
    """A canonical form read back."""

    base_fingerprint: str
    spec: AdapterSpec
    tensors: Tensors


def canonicalise(checkpoint: Checkpoint, text_parts: TextParts | None = None) -> CanonicalForm:
    """Build the canonical form of a checked checkpoint and compute its revision.

    Args:
        checkpoint: Config and tensors.
        text_parts: What it brings besides; without any, the form has the bytes that it had before there were such parts.
    """
    text_parts = replace(text_parts or TextParts(), invocation_token_ids=checkpoint.invocation_token_ids)
    config: dict[str, Any] = {
        "base": checkpoint.base_fingerprint,
        "format": FORMAT if all(module.is_plain for module in checkpoint.modules) else FORMAT_OF_PARTS,
        "modules": [module_fields(module) for module in checkpoint.modules],
    }
    if fields := text_parts.to_fields():
        config["text_parts"] = fields
    named = {name: tensor for module in checkpoint.modules for name, tensor in named_tensors(module)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "loraplex": _dumps(config)}}
    position = 0
    ordered = sorted(named.items())
    for name, tensor in ordered:
        end = position + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = _dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pieces = (memoryview(struct.pack("<Q", len(text)) + text), *(tensor.data for _, tensor in ordered))
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    revision = digest.hexdigest()
    return CanonicalForm(
        revision=revision,
        base_fingerprint=checkpoint.base_fingerprint,
        spec=AdapterSpec(
            revision,
            tuple(module.spec for module in checkpoint.modules),
            is_activated=bool(text_parts.invocation_token_ids),
        ),
        num_parameters=sum(int(np.prod(tensor.shape)) for _, tensor in ordered if not tensor.is_integer),
        num_bytes=8 + len(text) + position,
        pieces=pieces,
        text_parts=text_parts,
        warnings=checkpoint.warnings,
    )


def read_canonical(data: bytes | bytearray, revision: str) -> CanonicalAdapter:
    """Read a canonical form back, its digest checked.

    Raises:
        AdapterCorruptError: If the bytes are not those of ``revision``.
    """
    check_revision(revision, hashlib.sha256(data).hexdigest())
    reader = CanonicalReader(memoryview(data), revision)
    modules: list[ModuleSpec] = []
    values: dict[tuple[int, str, str], Arrays] = {}
    for layer in reader.bytes_needed:
        found, tensors = reader.layer(layer, as_stored=False)
        modules += found
        values |= tensors
    return CanonicalAdapter(reader.base_fingerprint, reader.spec_of(modules), values)


def check_revision(revision: str, found: str) -> None:
    """Check a canonical form's sha256.

    Raises:
        AdapterCorruptError: If it is another one's.
    """
    if found != revision:
        raise AdapterCorruptError(
            f"revision {revision}: the stored bytes have sha256 {found}; import the adapter again"
        )


class CanonicalReader:
    """Reads a canonical form layer by layer; its last bytes may still be on their way.

    Args:
        data: Room for all of it, with its header in front; the tensors' bytes are not copied.
        revision: For messages.

    Attributes:
        base_fingerprint: The base model.
        bytes_needed: Layer -> how many bytes must have arrived before the layer can be read, in the order of layers.

    Raises:
        AdapterCorruptUploadError: If the header is none of a safetensors file.
    """

    def __init__(self, data: memoryview, revision: str) -> None:
        self._revision = revision
        self._header = read_header(data)
        self._tensors = self._header.layout.tensors(data)
        self.base_fingerprint = self._header.base_fingerprint
        self.bytes_needed = self._header.bytes_needed

    def layer(
        self, layer: int, *, as_stored: bool = True
    ) -> tuple[list[ModuleSpec], dict[tuple[int, str, str], Arrays]]:
        """Return a layer's modules, and their tensors as `read_parts` gives them."""
        modules: list[ModuleSpec] = []
        values: dict[tuple[int, str, str], Arrays] = {}
        for projection, fields in self._header.modules[layer]:
            name = name_of(self._header.names, layer, projection)
            parts: list[Part] = []
            for part, arrays in read_parts(name, fields, self._tensors, as_stored=as_stored):
                parts.append(part)
                values[layer, projection, part.kind] = arrays
            modules.append(ModuleSpec(layer, projection, tuple(parts)))
        return modules, values

    def spec_of(self, modules: Iterable[ModuleSpec]) -> AdapterSpec:
        """Return the adapter's spec, from the modules of all layers in their order."""
        return AdapterSpec(self._revision, tuple(modules), self._header.is_activated)


def read_text_parts(head: bytes | bytearray) -> TextParts:
    """Return the text parts of a canonical form.

    Args:
        head: Its first `header_bytes`, or more.

    Raises:
        TypeError: If it has a part that this version does not know.
    """
    return TextParts.from_fields(read_config(bytes(head[: header_bytes(head)])).get("text_parts", {}))


def _dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
