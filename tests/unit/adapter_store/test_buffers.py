"""Memory of adapters and images is used again, and never while it is still read."""

from __future__ import annotations

import gc
import mmap
import resource
import threading
import time
from contextlib import closing

import numpy as np
import pytest
from loraplex_adapter_store.buffers import BufferPool

MIB = 1024 * 1024


PATIENCE_S = 20.0


def _wait_for_idle(pool: BufferPool, num_bytes: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while pool.idle_bytes != num_bytes:
        assert time.monotonic() < deadline, f"{pool.idle_bytes} bytes are idle"
        time.sleep(0.001)


def _faults_of_filling(array: np.ndarray) -> int:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    array.fill(1)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_a_buffer_is_used_again_once_no_array_shows_it() -> None:
    pool = BufferPool(max_idle_bytes=16 * MIB)
    first = pool.take(3 * MIB)
    address = _address(first)
    del first
    assert pool.idle_bytes == 4 * MIB
    assert _address(pool.take(4 * MIB)) == address


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(lambda array: array[5:7], id="slice"),
        pytest.param(lambda array: array.reshape(2, -1)[1].data, id="memoryview"),
        pytest.param(lambda array: array.view(np.uint16), id="view"),
    ],
)
def test_memory_that_is_still_read_is_not_written_over(part: object) -> None:
    pool = BufferPool(max_idle_bytes=16 * MIB)
    first = pool.take(2 * MIB)
    address = _address(first)
    view = part(first)  # type: ignore[operator]
    del first
    gc.collect()
    assert pool.idle_bytes == 0
    other = pool.take(2 * MIB)
    assert _address(other) != address
    del view
    assert pool.idle_bytes == 2 * MIB


def test_idle_buffers_stay_within_their_bound() -> None:
    pool = BufferPool(max_idle_bytes=5 * MIB)
    taken = [pool.take(2 * MIB) for _ in range(4)]
    taken.clear()
    assert pool.idle_bytes == 4 * MIB
    assert pool.take(100 * MIB).nbytes == 100 * MIB
    assert pool.idle_bytes == 4 * MIB


def test_a_large_buffer_is_not_spent_on_a_small_adapter() -> None:
    pool = BufferPool(max_idle_bytes=64 * MIB)
    pool.take(32 * MIB)
    small = pool.take(1)
    assert pool.idle_bytes == 32 * MIB
    assert small.shape == (1,)
    assert pool.take(0).shape == (0,)


def test_threads_never_share_a_buffer() -> None:
    pool = BufferPool(max_idle_bytes=8 * MIB)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            mine = pool.take(MIB)[:4096]
            mine[:] = number
            if np.any(mine != number):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong
    assert pool.idle_bytes <= 8 * MIB


def test_memory_touched_ahead_is_filled_without_page_faults() -> None:
    with closing(BufferPool(max_idle_bytes=64 * MIB, num_ahead=2)) as pool:
        with pool.busy():
            kept = pool.take(16 * MIB)
            assert _faults_of_filling(kept) >= 8  # fresh memory faults at least once for each huge page
        _wait_for_idle(pool, 32 * MIB)

        found = [pool.take(16 * MIB), pool.take(16 * MIB)]

        assert len({_address(each) for each in (kept, *found)}) == 3
        assert sum(map(_faults_of_filling, found)) < 8


def test_nothing_is_touched_ahead_while_an_image_is_made() -> None:
    with closing(BufferPool(max_idle_bytes=64 * MIB, num_ahead=2)) as pool:
        with pool.busy():
            with pool.busy():
                kept = pool.take(4 * MIB)
            mapping = mmap.mmap(-1, 4 * MIB)
            touching = threading.Thread(target=pool._touch, args=(mapping,))
            touching.start()  # one that began before waits, too
            touching.join(0.05)
            assert touching.is_alive()
            assert pool.idle_bytes == 0
        touching.join(PATIENCE_S)
        assert not touching.is_alive()
        _wait_for_idle(pool, 8 * MIB)
        assert kept.nbytes == 4 * MIB


@pytest.mark.parametrize("max_idle_mib", [1, 5, 7])
def test_memory_touched_ahead_keeps_to_the_bound_of_idle_buffers(max_idle_mib: int) -> None:
    with closing(BufferPool(max_idle_bytes=max_idle_mib * MIB, num_ahead=8)) as pool:
        with pool.busy():
            kept = pool.take(2 * MIB)
        _wait_for_idle(pool, max_idle_mib // 2 * 2 * MIB)
        assert kept.nbytes == 2 * MIB


def test_a_closed_pool_touches_nothing_and_its_buffers_stay_valid() -> None:
    pool = BufferPool(max_idle_bytes=64 * MIB, num_ahead=4)
    with pool.busy():
        mine = pool.take(4 * MIB)
        pool.close()

    mine[:] = 7

    assert int(mine.sum(dtype=np.int64)) == 7 * len(mine)
    del mine
    assert pool.idle_bytes == 4 * MIB
    assert not [each for each in threading.enumerate() if each is pool._toucher]
