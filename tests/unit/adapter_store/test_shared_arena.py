"""A store writes into an engine's arena, and into nothing else that this user holds open."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_adapter_store.attach.arena import SharedArena
from loraplex_adapter_store.attach.messages import ArenaInfo
from loraplex_common.arena_file import NAME, NONCE_BYTES, SEALS, create_arena_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PAGE_BYTES = 64
NUM_SLOTS = 4
SIZE = NONCE_BYTES + NUM_SLOTS * PAGE_BYTES
NONCE = bytes(range(NONCE_BYTES))


@pytest.fixture
def opened() -> Iterator[list[int]]:
    """Descriptors that the test closes at its end."""
    descriptors: list[int] = []
    yield descriptors
    for descriptor in descriptors:
        os.close(descriptor)


def open_arena(descriptor: int, *, nonce: bytes = NONCE, num_slots: int = NUM_SLOTS) -> SharedArena | None:
    info = ArenaInfo(
        num_slots=num_slots, num_free=num_slots, pid=os.getpid(), fd=descriptor, header_bytes=NONCE_BYTES, nonce=nonce
    )
    return SharedArena.open(info, PAGE_BYTES)


def unsealed_memfd(_: Path) -> int:
    descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, SIZE)
    return descriptor


def memfd_of_another_name(_: Path) -> int:
    descriptor = os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, SIZE)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    return descriptor


def plain_file(folder: Path) -> int:
    path = folder / "appendonly.aof"
    path.write_bytes(NONCE + bytes(SIZE - NONCE_BYTES))
    return os.open(path, os.O_RDWR)


def file_named_like_a_memfd(folder: Path) -> int:
    """A deleted file on a disk, whose link differs from a memory file's by its folder only."""
    path = folder / f"memfd:{NAME}"
    path.write_bytes(NONCE + bytes(SIZE - NONCE_BYTES))
    descriptor = os.open(path, os.O_RDWR)
    path.unlink()
    return descriptor


def test_a_page_is_written_into_an_arena(opened: list[int]) -> None:
    descriptor = create_arena_file(SIZE)
    opened.append(descriptor)
    os.pwrite(descriptor, NONCE, 0)

    arena = open_arena(descriptor)
    assert arena is not None
    arena.write(2, np.full(PAGE_BYTES, 7, dtype=np.uint8))
    arena.close()

    assert os.pread(descriptor, SIZE, 0) == NONCE + bytes(2 * PAGE_BYTES) + b"\x07" * PAGE_BYTES + bytes(PAGE_BYTES)


@pytest.mark.parametrize("make", [unsealed_memfd, memfd_of_another_name, plain_file, file_named_like_a_memfd])
def test_a_file_that_is_no_arena_is_not_opened_though_its_first_bytes_are_known(
    make: Callable[[Path], int], tmp_path: Path, opened: list[int]
) -> None:
    descriptor = make(tmp_path)
    opened.append(descriptor)
    os.pwrite(descriptor, NONCE, 0)

    assert open_arena(descriptor) is None


def test_an_arena_without_the_nonce_or_with_too_few_slots_is_refused(opened: list[int]) -> None:
    descriptor = create_arena_file(SIZE)
    opened.append(descriptor)
    os.pwrite(descriptor, NONCE, 0)

    assert open_arena(descriptor, nonce=bytes(NONCE_BYTES)) is None
    assert open_arena(descriptor, num_slots=NUM_SLOTS + 1) is None


def test_an_arena_cannot_be_resized_by_anyone(opened: list[int]) -> None:
    descriptor = create_arena_file(SIZE)
    opened.append(descriptor)

    for size in (0, SIZE + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
