"""Records come out of the ring as they went in, in order, for every reader; and nothing hangs on a reader that is gone."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_common.adapter_parts import AdapterSpec, ModuleSpec
from loraplex_engine.ranks.plan_ring import NUM_SLOTS, ROOM_BYTES, GroupLostError, Record, RingReader, RingWriter
from loraplex_engine.ranks.rank_records import (
    Load,
    load_bytes,
    plan_bytes,
    read_load,
    read_plan,
    read_unload,
    unload_bytes,
)
from loraplex_engine.step import MoreAdapters, StepPlan
from support.plans import sampling_arrays

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


def random_plan(rng: np.random.Generator, *, num_rows: int, num_more: int, width: int) -> StepPlan:
    """Return a plan whose numbers mean nothing."""

    def int32(*shape: int) -> NDArray[np.int32]:
        return rng.integers(-1, 1 << 20, shape, dtype=np.int32)

    def float32(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    return StepPlan(
        step_id=int(rng.integers(1 << 40)),
        slots=int32(num_rows),
        num_tokens=int32(num_rows),
        starts=int32(num_rows),
        token_ids=int32(3 * num_rows),
        block_tables=int32(2 * num_rows, width)[::2],
        adapters=int32(num_rows),
        adapter_scales=float32(num_rows),
        num_decode_rows=int(rng.integers(num_rows + 1)),
        sample_rows=int32(max(0, num_rows - 1)),
        sampling=sampling_arrays([], []),
        more_adapters=MoreAdapters(rows=int32(num_more), adapters=int32(num_more), scales=float32(num_more)),
    )


@pytest.fixture
def ring() -> Iterator[tuple[RingWriter, list[RingReader]]]:
    writer = RingWriter(2)
    yield writer, [RingReader(writer.fd, fds) for fds in writer.readers]
    writer.close()


def test_all_readers_get_all_records_in_order_whatever_their_sizes(
    ring: tuple[RingWriter, list[RingReader]],
) -> None:
    writer, readers = ring
    rng = np.random.default_rng(0)
    sizes = [0, 1, ROOM_BYTES - 1, ROOM_BYTES, ROOM_BYTES + 1, 3 * ROOM_BYTES, *rng.integers(0, 2 * ROOM_BYTES, 40)]
    sent = [Record(kind, rng.bytes(int(size))) for kind, size in enumerate(sizes)]

    with ThreadPoolExecutor(2) as threads:
        got = [threads.submit(lambda r=reader: list(itertools.islice(r.records(), len(sent)))) for reader in readers]  # type: ignore[misc]
        for kind, payload in sent:
            half = len(payload) // 2
            writer.write(kind, [payload[:half], payload[half:]], timeout_s=20)

        assert [each.result(20) for each in got] == [sent, sent]


def test_a_reader_without_work_sleeps(ring: tuple[RingWriter, list[RingReader]]) -> None:
    writer, (reader, _) = ring
    used: list[float] = []

    def read() -> None:
        began_s, began_at = time.thread_time(), time.monotonic()
        next(reader.records())
        used.append((time.thread_time() - began_s) / (time.monotonic() - began_at))

    thread = threading.Thread(target=read)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive(), "it read what was not written"
    writer.write(1, [b"x"], timeout_s=1)
    thread.join(20)

    assert used[0] < 0.2, "it burned its core: on a busy machine, too, it would have had more of it"


def test_a_reader_that_does_not_read_is_lost_and_not_waited_for(ring: tuple[RingWriter, list[RingReader]]) -> None:
    writer, (reader, _) = ring
    for _ in range(NUM_SLOTS):
        writer.write(1, [b"x"], timeout_s=1)
    list(itertools.islice(reader.records(), NUM_SLOTS))

    with pytest.raises(GroupLostError, match="rank 2 has read nothing"):
        writer.write(1, [b"x"], timeout_s=0.05)


@settings(max_examples=30, deadline=None)
@given(num_rows=st.integers(0, 5), num_more=st.integers(0, 4), width=st.integers(1, 7), seed=st.integers(0, 1000))
def test_a_plan_comes_out_with_its_rows_pages_and_adapters(num_rows: int, num_more: int, width: int, seed: int) -> None:
    plan = random_plan(np.random.default_rng(seed), num_rows=num_rows, num_more=num_more, width=width)

    found = read_plan(b"".join(plan_bytes(plan)))

    for name in ("slots", "num_tokens", "starts", "adapters", "adapter_scales", "sample_rows", "block_tables"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plan, name), err_msg=name)
    for name in MoreAdapters.__slots__:
        np.testing.assert_array_equal(getattr(found.more_adapters, name), getattr(plan.more_adapters, name))
    assert (found.step_id, found.num_decode_rows) == (plan.step_id, plan.num_decode_rows)


def test_a_cut_record_is_refused() -> None:
    payload = b"".join(plan_bytes(random_plan(np.random.default_rng(1), num_rows=3, num_more=0, width=4)))

    with pytest.raises(ValueError, match="ends before byte"):
        read_plan(payload[:-1])


def test_loads_and_unloads_come_out_as_they_went_in() -> None:
    load = Load(
        1 << 40,
        7,
        AdapterSpec("ab" * 32, (ModuleSpec.low_rank(1, "q_proj", 4, 2.0),)),
        np.array([3, 1, 2], dtype=np.int32),
        (9, 4, 5),
    )

    found = read_load(b"".join(load_bytes(load)))

    assert found._replace(pages=load.pages) == load
    assert found.pages.tolist() == [3, 1, 2]
    assert read_unload(unload_bytes(12)) == 12
