"""Reads the tensors of an adapter's directory, for a push."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Final

from loraplex_common.adapter_folder import CONFIG_FILE, WEIGHTS_FILES, check_present, list_folder
from loraplex_common.directories import adapter_directory_problem
from loraplex_common.errors import AdapterCorruptUploadError, InvalidParameterError

from loraplex_client._push_messages import RawTensor

if TYPE_CHECKING:
    from pathlib import Path

MAX_HEADER_BYTES: Final = 16 * 1024 * 1024


def read_tensors(directory: Path) -> tuple[dict[str, RawTensor], bytes]:
    """Return the tensors of a PEFT directory and its adapter_config.json.

    Raises:
        InvalidParameterError: If there is no such directory, or it brings texts, which a push cannot carry.
        AdapterCorruptUploadError: If a file is missing, or the weights are no safetensors file.
    """
    if problem := adapter_directory_problem(directory):
        raise InvalidParameterError(problem, field="directory")
    names = check_present(list_folder(directory))
    texts = [name for name in names if name != CONFIG_FILE and name not in WEIGHTS_FILES]
    if texts:
        raise InvalidParameterError(
            f"{directory} has {', '.join(texts)}: a push carries tensors alone; import it, or push from a directory without",
            field="directory",
        )
    weights = next(name for name in names if name in WEIGHTS_FILES)
    return _tensors((directory / weights).read_bytes(), weights), (directory / CONFIG_FILE).read_bytes()


def _tensors(data: bytes, file: str) -> dict[str, RawTensor]:
    """Return views of a safetensors file's tensors; the store checks what they say."""
    (length,) = struct.unpack("<Q", data[:8]) if len(data) >= 8 else (0,)
    if not 0 < length <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise AdapterCorruptUploadError(f"{file}: it is no safetensors file")
    body = memoryview(data)[8 + length :]
    try:
        entries = json.loads(data[8 : 8 + length])
        return {
            name: RawTensor(entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterCorruptUploadError(f"{file}: its header cannot be read: {error}") from error
