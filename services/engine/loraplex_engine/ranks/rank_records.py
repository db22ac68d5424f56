"""What rank 0 tells the other ranks through their ring, as bytes of a fixed layout; all numbers are little-endian.

A plan has what the other ranks compute with: rows, pages and adapters. How rows draw, and the token ids, are rank 0's alone; it
broadcasts the ids as the step begins. With N rows, S sampling rows, blocks P wide and E further adapters of rows:

    int64 step_id, int32 N, S, P, E, num_decode_rows, 0
    int32 slots[N], num_tokens[N], starts[N], adapters[N], fp32 adapter_scales[N], int32 sample_rows[S],
    int32 rows[E], adapters[E], fp32 scales[E] of `MoreAdapters`, int32 block_tables[N][P]

A load is int64 number, int32 index, num_pages, int32 pages[num_pages], arena slots[num_pages], then the JSON of `AdapterSpec`;
an unload is int32 index.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from loraplex_common.adapter_image import AdapterSpec

from loraplex_engine.step import MoreAdapters, SamplingArrays, StepPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_PLAN: Final = struct.Struct("<qiiiiii")
_LOAD: Final = struct.Struct("<qii")
_UNLOAD: Final = struct.Struct("<i")


class Kind(enum.IntEnum):
    """What a record says."""

    PLAN = 1
    LOAD = 2
    UNLOAD = 3


class Load(NamedTuple):
    """An adapter that all ranks load.

    Attributes:
        number: Number of the load, for the answer.
        place: Index of the adapter table.
        pages: int32 ``[num_pages]``; page ids in image order.
        slots: ``[num_pages]``; where the rank's arena has the image.
    """

    number: int
    place: int
    spec: AdapterSpec
    pages: NDArray[np.int32]
    slots: tuple[int, ...]


def plan_bytes(plan: StepPlan) -> tuple[bytes, ...]:
    """Return the pieces of a plan's record."""
    more, (num_rows, width) = plan.more_adapters, plan.block_tables.shape
    head = _PLAN.pack(plan.step_id, num_rows, len(plan.sample_rows), width, len(more.rows), plan.num_decode_rows, 0)
    integers = (plan.slots, plan.num_tokens, plan.starts, plan.adapters)
    return (
        head,
        *(_int32(each) for each in integers),
        _float32(plan.adapter_scales),
        _int32(plan.sample_rows),
        *(_int32(more.rows), _int32(more.adapters), _float32(more.scales)),
        _int32(plan.block_tables),
    )


def read_plan(payload: bytes) -> StepPlan:
    """Return a plan without what only rank 0 needs: token ids, how rows draw, and new occupants of slots."""
    step_id, num_rows, num_samples, width, num_more, num_decode_rows, _ = _PLAN.unpack_from(payload)
    words = _Words(payload, _PLAN.size)
    slots, num_tokens, starts, adapters = (words.int32(num_rows) for _ in range(4))
    scales, sample_rows = words.float32(num_rows), words.int32(num_samples)
    more = MoreAdapters(rows=words.int32(num_more), adapters=words.int32(num_more), scales=words.float32(num_more))
    return StepPlan(
        step_id=step_id,
        slots=slots,
        num_tokens=num_tokens,
        starts=starts,
        token_ids=np.empty(0, dtype=np.int32),
        block_tables=words.int32(num_rows * width).reshape(num_rows, width),
        adapters=adapters,
        adapter_scales=scales,
        num_decode_rows=num_decode_rows,
        sample_rows=sample_rows,
        sampling=_NO_SAMPLING,
        more_adapters=more,
    )


def load_bytes(load: Load) -> tuple[bytes, ...]:
    """Return the pieces of a load's record."""
    head = _LOAD.pack(load.number, load.place, len(load.pages))
    return head, _int32(load.pages), _int32(load.slots), load.spec.to_json()


def read_load(payload: bytes) -> Load:
    """Return a load."""
    number, place, num_pages = _LOAD.unpack_from(payload)
    words = _Words(payload, _LOAD.size)
    pages, slots = words.int32(num_pages), tuple(words.int32(num_pages).tolist())
    return Load(number, place, AdapterSpec.from_json(payload[words.at :]), pages, slots)


def unload_bytes(index: int) -> bytes:
    """Return the record of an adapter that leaves the table."""
    return _UNLOAD.pack(index)


def read_unload(payload: bytes) -> int:
    """Return the index that is unbound."""
    return int(_UNLOAD.unpack(payload)[0])


class _Words:
    """Reads one array behind another."""

    def __init__(self, payload: bytes, at: int) -> None:
        self._payload, self.at = payload, at

    def int32(self, count: int) -> NDArray[np.int32]:
        return np.frombuffer(self._take(count), dtype="<i4")

    def float32(self, count: int) -> NDArray[np.float32]:
        return np.frombuffer(self._take(count), dtype="<f4")

    def _take(self, count: int) -> bytes:
        begin, self.at = self.at, self.at + 4 * count
        if self.at > len(self._payload):
            raise ValueError(f"a record of {len(self._payload)} bytes ends before byte {self.at}")
        return self._payload[begin : self.at]


def _int32(array: NDArray[np.int32] | Sequence[int]) -> bytes:
    return np.ascontiguousarray(array, dtype="<i4").tobytes()


def _float32(array: NDArray[np.float32]) -> bytes:
    return np.ascontiguousarray(array, dtype="<f4").tobytes()


_F, _I = np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int32)
_NO_SAMPLING: Final = SamplingArrays(
    temperature=_F,
    top_k=_I,
    top_p=_F,
    min_p=_F,
    repetition_penalty=_F,
    presence_penalty=_F,
    frequency_penalty=_F,
    seed=np.empty(0, dtype=np.uint64),
    position=_I,
    num_logprobs=_I,
    ban_stops=np.empty(0, dtype=np.bool_),
)
