"""The parts of a checkpoint once it has arrived, and which files are read at all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from loraplex_common.adapter_folder import (
    CONFIG_FILE,
    GENERATION_FILE,
    SIGNATURE_FILE,
    TEXT_FILES,
    WEIGHTS_FILE,
    WEIGHTS_FILES,
    explain_content,
)
from loraplex_common.errors import AdapterCorruptUploadError

from loraplex_adapter_store.checkpoint.bounds import MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

_TEXTS: Final = frozenset({"chat_template.jinja", "merges.txt"})  # may begin with anything


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """The content of the files that are read.

    Attributes:
        texts: Name -> content of the texts beside it: tokenizer files, chat template, generation defaults.
        source: Where they came from, for people to read, e.g. ``dir:demo/json``.
        weights_file: Name of the file that the weights are from.
        signature: The signature that came with them; empty if none came, or none was wanted.
    """

    config: bytes
    weights: bytes | bytearray
    source: str
    texts: dict[str, bytes] = field(default_factory=dict)
    weights_file: str = WEIGHTS_FILE
    signature: bytes = b""


def limit_of(name: str, max_adapter_bytes: int) -> int:
    """Return the most bytes read of a file."""
    if name in WEIGHTS_FILES:
        return max_adapter_bytes
    return MAX_CONFIG_BYTES if name in (CONFIG_FILE, GENERATION_FILE, SIGNATURE_FILE) else MAX_TOKENIZER_BYTES


def check_size(name: str, num_bytes: int, max_adapter_bytes: int) -> int:
    """Return the size of a file that may be read.

    Raises:
        AdapterCorruptUploadError: If it is too large.
    """
    limit = limit_of(name, max_adapter_bytes)
    if num_bytes > limit:
        raise AdapterCorruptUploadError(f"{name}: {num_bytes} bytes, at most {limit} are read (--max-adapter-bytes)")
    return num_bytes


def from_contents(contents: Mapping[str, bytes | bytearray], source: str) -> CheckpointFiles:
    """Sort file contents into a `CheckpointFiles`.

    Raises:
        AdapterCorruptUploadError: If a file's first bytes show another format, e.g. a pointer of git-lfs.
    """
    for name, data in contents.items():
        if name not in _TEXTS and (kind := explain_content(data)) is not None:
            raise AdapterCorruptUploadError(f"{name}: {kind}")
    texts = {name: bytes(data) for name, data in contents.items() if name in TEXT_FILES}
    weights_file = next(name for name in WEIGHTS_FILES if name in contents)
    config, signature = bytes(contents[CONFIG_FILE]), bytes(contents.get(SIGNATURE_FILE, b""))
    return CheckpointFiles(config, contents[weights_file], source, texts, weights_file, signature)
