"""Memory of adapters and images is used again, and never while it is still read."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from loraplex_adapter_store.buffers import BufferPool

MIB = 1024 * 1024


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
