"""The struct of arrays behind the running requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from loraplex_engine.messages import AdapterTerm
from loraplex_engine.sampling_params import SamplingParams
from loraplex_engine.scheduler.decode_state import NO_PAGE, DecodeState
from loraplex_engine.scheduler.request import Request, make_request
from support.scheduler_rig import make_submission

if TYPE_CHECKING:
    from loraplex_engine.pages.page_pool import Pages
    from numpy.typing import NDArray


def make_state(max_num_seqs: int = 4) -> DecodeState:
    return DecodeState(max_num_seqs=max_num_seqs, max_model_len=32, block_tokens=4)


def a_request(**fields: object) -> Request:
    return make_request(make_submission(**fields), number=0, now_s=0.0, max_model_len=32)  # type: ignore[arg-type]


def pages(*ids: int) -> Pages:
    return np.array(ids, dtype=np.intp)


def int32(*values: int) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def test_a_seat_holds_tokens_pages_and_settings() -> None:
    state = make_state()
    request = a_request(
        prompt=[1, 2, 3], resumed=[9], sampling=SamplingParams(temperature=0.5, top_k=7, seed=2**64 - 1)
    )

    slot = state.seat(request, adapters=(5,), pages=pages(10, 11), stop_ids=(3, 4))

    assert state.tokens[slot, :4].tolist() == [1, 2, 3, 9]
    assert state.blocks[slot, :3].tolist() == [10, 11, NO_PAGE]
    assert state.adapters[slot] == 5
    sampling = state.sampling(np.array([slot]))
    assert (sampling.temperature[0], sampling.top_k[0], int(sampling.seed[0])) == (0.5, 7, 2**64 - 1)
    assert sampling.position[0] == 1


def test_a_vacated_slot_gives_its_pages_back_and_changes_occupancy() -> None:
    state = make_state(1)
    slot = state.seat(a_request(), adapters=(), pages=pages(7), stop_ids=())
    before = int(state.occupancy[slot])

    freed = state.vacate(slot)

    assert freed.tolist() == [7]
    assert state.occupancy[slot] > before
    assert (state.blocks == NO_PAGE).all()
    assert state.num_free == 1


def test_rows_to_decode_leaves_out_prefills_and_those_at_their_limit() -> None:
    state = make_state()
    slots = [state.seat(a_request(max_new_tokens=2), adapters=(), pages=pages(i), stop_ids=()) for i in range(3)]
    rows = np.array(slots)
    state.is_decoding[slots[1:]] = True
    state.next_position[slots[2]] = 2

    assert state.rows_to_decode(rows).tolist() == [slots[1]]


def test_a_row_needs_a_block_exactly_when_its_blocks_are_full() -> None:
    state = make_state()
    row = np.array([state.seat(a_request(), adapters=(), pages=pages(1), stop_ids=())])

    needs = []
    for computed in range(3, 6):
        state.num_computed[row] = computed
        needs.append(bool(state.needs_block(row)[0]))
    assert needs == [False, True, False]

    state.num_computed[row] = 4
    state.append_blocks(row, pages(2))
    assert not state.needs_block(row)[0]
    assert state.block_tables(row).tolist() == [[1, 2]]


def test_recorded_tokens_are_kept_and_stops_recognised_per_row() -> None:
    state = make_state()
    stops = [(5,), (6, 7, 8, 9, 10, 11), ()]
    rows = np.array([state.seat(a_request(), adapters=(), pages=pages(i), stop_ids=s) for i, s in enumerate(stops)])

    is_stop = state.record(rows, int32(0, 0, 0), int32(5, 11, 5))

    assert is_stop.tolist() == [True, True, False]
    assert [state.outputs(slot).tolist() for slot in rows.tolist()] == [[5], [11], [5]]


def test_a_stop_id_before_min_new_tokens_does_not_end() -> None:
    state = make_state()
    row = np.array([state.seat(a_request(min_new_tokens=2), adapters=(), pages=pages(1), stop_ids=(5,))])

    assert state.sampling(row).ban_stops[0]
    assert not state.record(row, int32(1), int32(5))[0]
    assert state.record(row, int32(2), int32(5))[0]


def test_a_successors_stop_ids_replace_its_predecessors() -> None:
    state = make_state(1)
    slot = state.seat(a_request(), adapters=(), pages=pages(1), stop_ids=tuple(range(20)))
    state.vacate(slot)

    slot = state.seat(a_request(), adapters=(), pages=pages(1), stop_ids=(3,))

    assert not state.record(np.array([slot]), int32(0), int32(4))[0]
    assert state.record(np.array([slot]), int32(0), int32(3))[0]


def test_adapters_beside_the_first_go_with_their_rows_in_order_and_leave_with_the_occupant() -> None:
    state = make_state()
    terms = (AdapterTerm("b", 0.5), AdapterTerm("c", 2.0))
    several = a_request(adapter="a", more_adapters=terms)
    slots = [
        state.seat(a_request(), adapters=(), pages=pages(1), stop_ids=()),
        state.seat(several, adapters=(4, 9, 3), pages=pages(2), stop_ids=()),
        state.seat(a_request(), adapters=(), pages=pages(3), stop_ids=()),
    ]

    more = state.more_adapters_of(np.array([slots[2], slots[1], slots[0]]))

    assert (more.rows.tolist(), more.adapters.tolist(), more.scales.tolist()) == ([1, 1], [9, 3], [0.5, 2.0])
    assert [str(each.dtype) for each in (more.rows, more.adapters, more.scales)] == ["int32", "int32", "float32"]
    state.vacate(slots[1])
    again = state.seat(a_request(), adapters=(), pages=pages(2), stop_ids=())
    assert again == slots[1]
    assert len(state.more_adapters_of(np.array([again])).rows) == 0
