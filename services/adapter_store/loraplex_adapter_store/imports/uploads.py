"""Receives an upload: nothing becomes visible before every announced byte has arrived and its sha256 is right."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from loraplex_common.adapter_folder import (
    CONFIG_FILE,
    PICKLE_SUFFIXES,
    READ_FILES,
    SIGNATURE_FILE,
    WEIGHTS_FILE,
    check_present_signed,
)
from loraplex_common.errors import (
    AdapterCorruptUploadError,
    AdapterIncompatibleError,
    DeadlineError,
    InvalidParameterError,
    LoraplexError,
)

from loraplex_adapter_store.checkpoint.bounds import MAX_PART_BYTES
from loraplex_adapter_store.imports.files import CheckpointFiles, check_size, from_contents
from loraplex_adapter_store.imports.pace import Pace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

IDLE_S: Final = 60.0
LINGER_S: Final = 1.0
LINGER_BYTES: Final = 16 * 1024 * 1024
Part = TypeVar("Part")
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnouncedFile:
    """A file as the header announces it."""

    name: str
    num_bytes: int
    sha256: str


def check_announced(files: tuple[AnnouncedFile, ...], max_adapter_bytes: int) -> int:
    """Return the sum of the announced files' bytes.

    Raises:
        AdapterIncompatibleError: If a file is a pickle.
        InvalidParameterError: If a file has a name that is not read, or is announced twice.
        AdapterCorruptUploadError: If a file is missing or too large.
    """
    for file in files:
        if file.name.lower().endswith(PICKLE_SUFFIXES):
            raise AdapterIncompatibleError(f"{file.name}: pickles are never read, because reading them runs code")
        if file.name not in (*READ_FILES, SIGNATURE_FILE):
            raise InvalidParameterError(
                f"{file.name[:200]!r} is not read; an upload is {CONFIG_FILE}, {WEIGHTS_FILE} and perhaps tokenizer files and {SIGNATURE_FILE}",
                field="header.files",
            )
        if _SHA256.fullmatch(file.sha256) is None:
            raise InvalidParameterError(
                f"{file.name}: sha256 is not 64 lower-case hex digits", field="header.files.sha256"
            )
    names = [file.name for file in files]
    if len(set(names)) != len(names):
        raise InvalidParameterError("a file is announced twice", field="header.files")
    unread = sorted(set(names) - set(check_present_signed(names, signature=True)))
    if unread:
        raise InvalidParameterError(f"{unread[0]}: another file has the weights; upload one", field="header.files")
    return sum(check_size(file.name, file.num_bytes, max_adapter_bytes) for file in files)


async def receive(
    files: tuple[AnnouncedFile, ...], parts: AsyncIterator[bytes], take: Callable[[int], Awaitable[None]]
) -> CheckpointFiles:
    """Collect the announced files from the parts of a stream.

    Args:
        files: What the header announces.
        parts: The stream.
        take: Waits for memory for that many more bytes.

    Raises:
        AdapterCorruptUploadError: If the stream ends early or is too long, or a sha256 is wrong.
        InvalidParameterError: If a part is too large.
        DeadlineError: If the client sends nothing for `IDLE_S`, or less than `Pace` requires.
        SaturatedError: If there is no memory for the bytes.
    """
    parts = in_time(parts, "the upload", size=len)
    contents: dict[str, bytearray] = {}
    rest = memoryview(b"")
    for file in files:
        data, digest = bytearray(), hashlib.sha256()
        while len(data) < file.num_bytes:
            if not rest:
                rest = memoryview(await _next_part(parts, file, len(data)))
                await take(len(rest))
            taken = rest[: file.num_bytes - len(data)]
            data += taken
            digest.update(taken)
            rest = rest[len(taken) :]
        if digest.hexdigest() != file.sha256:
            raise AdapterCorruptUploadError(f"{file.name}: sha256 is {digest.hexdigest()}, announced was {file.sha256}")
        contents[file.name] = data
    if rest or await _has_more(parts):
        raise AdapterCorruptUploadError("more bytes than announced")
    return from_contents(contents, "upload")


async def in_time(parts: AsyncIterator[Part], what: str, *, size: Callable[[Part], int]) -> AsyncIterator[Part]:
    """Yield the parts while enough of them come; the time that they wait here for their reader does not count.

    Args:
        parts: The stream.
        what: Its name, for errors.
        size: Gives the bytes of a part.

    Raises:
        DeadlineError: If too little comes in too long a time, see `Pace`.
    """
    pace = Pace(what)
    while True:
        began_s = time.monotonic()
        try:
            part = await anext(parts)
        except StopAsyncIteration:
            return
        pace.came(size(part), time.monotonic() - began_s)
        yield part


async def linger(parts: AsyncIterator[object]) -> None:
    """Read on for a moment before an upload is refused.

    Without this, a client in the middle of a write would see its stream break instead of the reason: some gRPC clients
    report whichever of the two they notice first. Whatever else is wrong with these last parts no longer matters.
    """
    num_bytes = 0
    with contextlib.suppress(TimeoutError, LoraplexError):
        async with asyncio.timeout(LINGER_S):
            async for part in parts:
                num_bytes += len(part) if isinstance(part, bytes) else 0
                if num_bytes > LINGER_BYTES:
                    return


async def _next_part(parts: AsyncIterator[bytes], file: AnnouncedFile, num_received: int) -> bytes:
    try:
        async with asyncio.timeout(IDLE_S):
            part = await anext(parts)
    except StopAsyncIteration:
        raise AdapterCorruptUploadError(
            f"{file.name}: truncated: {num_received} of {file.num_bytes} bytes have come"
        ) from None
    except TimeoutError:
        raise DeadlineError(f"{file.name}: nothing has come for {IDLE_S:.0f} s") from None
    if len(part) > MAX_PART_BYTES:
        raise InvalidParameterError(f"a part of {len(part)} bytes, at most {MAX_PART_BYTES} are read", field="data")
    return part


async def _has_more(parts: AsyncIterator[bytes]) -> bool:
    try:
        async with asyncio.timeout(IDLE_S):
            return bool(await anext(parts))
    except StopAsyncIteration:
        return False
    except TimeoutError:
        raise DeadlineError("the upload is complete but the stream stays open") from None
