"""The host arena: shared memory and its slots."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex_engine.adapters import arena as arena_module
from loraplex_engine.adapters.arena import HEADER_BYTES, HostArena


def test_another_process_finds_nonce_and_slots_through_the_file() -> None:
    arena = HostArena(4, 64)
    with open(f"/proc/{os.getpid()}/fd/{arena.fd}", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        assert memory[:32] == arena.nonce
        memory[HEADER_BYTES + 2 * 64 : HEADER_BYTES + 3 * 64] = bytes(range(64))

    assert arena.view[2].tolist() == list(range(64))
    arena.close()


def test_slots_are_neighbours_if_there_is_a_gap_for_them() -> None:
    arena = HostArena(8, 64)
    first, second, third = arena.allocate(2), arena.allocate(3), arena.allocate(3)
    assert first is not None
    assert second is not None
    assert third is not None
    arena.free(first)
    arena.free(third)

    slots = arena.allocate(3)

    assert slots == (5, 6, 7)
    assert np.shares_memory(arena.pages(slots), arena.view)
    arena.close()


@given(
    operations=st.lists(st.tuples(st.booleans(), st.integers(1, 7)), max_size=60), window=st.sampled_from([1, 4, 64])
)
def test_an_allocation_is_of_neighbours_wherever_there_is_such_a_gap(
    operations: list[tuple[bool, int]], window: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena_module, "_WINDOW_SLOTS", window)
        arena = HostArena(24, 64)
        held: list[tuple[int, ...]] = []
        for frees, size in operations:
            if frees and held:
                arena.free(held.pop(size % len(held)))
                continue
            taken = {slot for slots in held for slot in slots}
            gaps = [start for start in range(25 - size) if taken.isdisjoint(range(start, start + size))]
            slots = arena.allocate(size)
            assert (slots is None) == (24 - len(taken) < size)
            if slots is not None:
                assert taken.isdisjoint(slots)
                assert len(set(slots)) == size
                assert not gaps or slots == tuple(range(slots[0], slots[0] + size))
                held.append(slots)
            arena.check_integrity()
        arena.close()


def test_scattered_slots_serve_too() -> None:
    arena = HostArena(4, 64)
    every = arena.allocate(4)
    assert every is not None
    arena.free([0, 2])
    slots = arena.allocate(2)
    assert slots == (0, 2)
    arena.view[0], arena.view[2] = 7, 9

    pages = arena.pages(slots)

    assert pages[:, 0].tolist() == [7, 9]
    arena.close()


def test_an_arena_without_room_says_none() -> None:
    arena = HostArena(2, 64)

    assert arena.allocate(3) is None
    assert arena.num_free == 2
    arena.close()


def test_freeing_twice_raises() -> None:
    arena = HostArena(2, 64)
    slots = arena.allocate(1)
    assert slots is not None
    arena.free(slots)

    with pytest.raises(RuntimeError, match="freed twice"):
        arena.free(slots)
    arena.check_integrity()
    arena.close()


def test_closing_twice_and_under_a_view_is_harmless() -> None:
    arena = HostArena(2, 64)
    view = arena.view
    fd = arena.fd

    arena.close()
    arena.close()

    view[0] = 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
