"""Room for running rows is made a few steps ahead of need, but never at the cost of a request that waits."""

from __future__ import annotations

from loraplex_engine.messages import ResidencyState
from support.scheduler_rig import Rig, make_submission, solo

BLOCK = 4


def fill_with_cached_blocks(rig: Rig, num_blocks: int) -> None:
    """Leave that many cached blocks behind, each of another prompt."""
    for index in range(num_blocks):
        rig.submit(make_submission(slot=index, prompt=[20 + index] * BLOCK, max_new_tokens=1))
        rig.run()
    assert rig.pool.num_cached == num_blocks


def test_room_made_for_growth_leaves_a_watermark_free_for_the_next_steps() -> None:
    rig = Rig(num_pages=24, block_tokens=BLOCK)
    fill_with_cached_blocks(rig, 20)
    # rows that come to the end of a block at different steps
    clients = [rig.submit(make_submission(slot=row, prompt=[row] * (row + 1), max_new_tokens=16)) for row in range(4)]
    while len(rig.scheduler.batch) < 4 or rig.scheduler.batch.num_prefill_tokens:
        rig.turn()

    watermark = 1 + 4 * 4 // BLOCK
    num_growths = num_rooms = 0
    while len(rig.scheduler.batch) == 4:
        evicted, free = rig.scheduler.prefix.num_evicted, rig.pool.num_free
        rig.turn()
        made = rig.scheduler.prefix.num_evicted - evicted
        num_growths += free + made - rig.pool.num_free > 0
        if made and len(rig.scheduler.batch) == 4:
            num_rooms += 1
            assert rig.pool.num_free >= watermark

    assert num_rooms >= 1
    assert num_growths >= 3 * num_rooms  # most steps that need a page find one
    rig.run()
    assert [client.tokens for client in clients] == [solo(client.submission, 16) for client in clients]


def test_the_watermark_takes_no_adapter_that_a_waiting_request_claims() -> None:
    rig = Rig(num_pages=6, block_tokens=BLOCK, max_num_seqs=1)
    rig.submit(make_submission(slot=50, adapter="a", prompt=[9], max_new_tokens=1))
    assert rig.deliver("a", 3)
    rig.run()
    fill_with_cached_blocks(rig, 1)
    running = rig.submit(make_submission(slot=51, prompt=[1] * 5, max_new_tokens=8))  # four pages, of which two at once
    waiting = rig.submit(make_submission(slot=52, adapter="a", prompt=[2], max_new_tokens=1))

    while running.end is None and rig.pool.num_cached:
        rig.turn()
        assert rig.cache.state_of("a") is ResidencyState.RESIDENT

    assert rig.scheduler.prefix.num_evicted == 1  # the row grew into the cached block
    rig.run()
    assert running.tokens == solo(running.submission, 8)
    assert waiting.tokens == solo(waiting.submission, 1)
