"""Receives pushed tensors into the file that they would have come in, so that all checks of files hold for them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from loraplex_common.adapter_folder import WEIGHTS_FILE
from loraplex_common.errors import (
    AdapterCorruptUploadError,
    AdapterIncompatibleError,
    DeadlineError,
    InvalidParameterError,
)

from loraplex_adapter_store.checkpoint.bounds import MAX_CONFIG_BYTES, MAX_DIMENSIONS, MAX_PART_BYTES, MAX_TENSORS
from loraplex_adapter_store.checkpoint.safetensors_file import ITEM_BYTES
from loraplex_adapter_store.imports.files import CheckpointFiles, check_size
from loraplex_adapter_store.imports.uploads import IDLE_S, in_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

SOURCE: Final = "push"
"""What a pushed revision's source says."""
_MAX_NAME: Final = 512


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a push.

    Attributes:
        sha256: sha256 over all bytes before it, 64 hex digits.
    """

    sha256: str


Part: TypeAlias = bytes | Finish


@dataclass(frozen=True, slots=True)
class PushedTensor:
    """A tensor as the header announces it.

    Attributes:
        dtype: As safetensors names it, e.g. ``BF16``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class PushedAdapter:
    """What a push announces: adapter_config.json, and the tensors in the order in which their bytes come."""

    config: bytes
    tensors: tuple[PushedTensor, ...]

    def check(self, max_adapter_bytes: int) -> int:
        """Return the bytes of the file that the push amounts to.

        Raises:
            InvalidParameterError: If a tensor has no name, one of another tensor, or no sensible shape; or if there are none.
            AdapterIncompatibleError: If a tensor has a dtype that is not read.
            AdapterCorruptUploadError: If there are too many tensors or bytes.
        """
        if len(self.config) > MAX_CONFIG_BYTES:
            raise AdapterCorruptUploadError(
                f"adapter_config: {len(self.config)} bytes, at most {MAX_CONFIG_BYTES} are read"
            )
        if not 0 < len(self.tensors) <= MAX_TENSORS:
            raise InvalidParameterError(
                f"{len(self.tensors)} tensors; a push has 1 to {MAX_TENSORS}", field="header.tensors"
            )
        names: set[str] = set()
        for tensor in self.tensors:
            _check_tensor(tensor, names)
            names.add(tensor.name)
        return check_size(WEIGHTS_FILE, len(self.file_header()) + self.num_data_bytes, max_adapter_bytes)

    @property
    def num_data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    def file_header(self) -> bytes:
        """Return what a safetensors file of these tensors begins with."""
        entries: dict[str, Any] = {}
        position = 0
        for tensor in self.tensors:
            end = position + tensor.num_bytes
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        return struct.pack("<Q", len(text)) + text


def _check_tensor(tensor: PushedTensor, names: set[str]) -> None:
    shown = tensor.name[:200]
    if not 0 < len(tensor.name) <= _MAX_NAME or tensor.name == "__metadata__":
        raise InvalidParameterError(
            f"{shown!r} is no tensor's name: 1 to {_MAX_NAME} characters", field="header.tensors.name"
        )
    if tensor.name in names:
        raise InvalidParameterError(f"tensor {shown} is announced twice", field="header.tensors.name")
    if tensor.dtype not in ITEM_BYTES:
        raise AdapterIncompatibleError(
            f"tensor {shown}: dtype {tensor.dtype[:40]!r} is not one of {', '.join(ITEM_BYTES)}"
        )
    if len(tensor.shape) > MAX_DIMENSIONS or any(size >= 1 << 32 for size in tensor.shape):
        raise InvalidParameterError(
            f"tensor {shown}: at most {MAX_DIMENSIONS} dimensions below 2^32", field="header.tensors.shape"
        )


async def receive(
    adapter: PushedAdapter, parts: AsyncIterator[Part], take: Callable[[int], Awaitable[None]]
) -> CheckpointFiles:
    """Collect the announced tensors from the parts of a stream.

    Args:
        adapter: What the header announces, checked.
        parts: The stream behind it.
        take: Waits for memory for that many more bytes.

    Raises:
        AdapterCorruptUploadError: If the stream ends early or has too many bytes, or the sha256 is wrong.
        InvalidParameterError: If a part is too large.
        DeadlineError: If the client sends nothing for `IDLE_S`, or less than `Pace` requires.
        SaturatedError: If there is no memory for the bytes.
    """
    data, digest = bytearray(adapter.file_header()), hashlib.sha256()
    num_expected = len(data) + adapter.num_data_bytes
    await take(len(data))
    parts = in_time(parts, "the push", size=lambda part: len(part) if isinstance(part, bytes) else 0)
    while not isinstance(part := await _next(parts, len(data), num_expected), Finish):
        if len(part) > MAX_PART_BYTES:
            raise InvalidParameterError(f"a part of {len(part)} bytes, at most {MAX_PART_BYTES} are read", field="data")
        if len(data) + len(part) > num_expected:
            raise AdapterCorruptUploadError("more bytes than the announced tensors have")
        await take(len(part))
        data += part
        digest.update(part)
    if len(data) < num_expected:
        raise AdapterCorruptUploadError(f"truncated: {len(data)} of {num_expected} bytes have come")
    if digest.hexdigest() != part.sha256:
        raise AdapterCorruptUploadError(f"sha256 of the tensors is {digest.hexdigest()}, sent was {part.sha256[:80]!r}")
    return CheckpointFiles(adapter.config, data, SOURCE)


async def _next(parts: AsyncIterator[Part], num_received: int, num_expected: int) -> Part:
    try:
        async with asyncio.timeout(IDLE_S):
            return await anext(parts)
    except StopAsyncIteration:
        raise AdapterCorruptUploadError(
            f"the push ended without a finish: {num_received} of {num_expected} bytes have come"
        ) from None
    except TimeoutError:
        raise DeadlineError(f"nothing has come for {IDLE_S:.0f} s") from None
