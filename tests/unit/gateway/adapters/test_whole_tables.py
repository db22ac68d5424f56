"""A whole table of names is taken in step by step: other tasks run in between, and what is known stays true."""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex_common.adapter_names import AdapterNames
from loraplex_common.alias_feed import SLICE_NAMES, AdapterEntry
from loraplex_gateway.adapters.names import NameTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NUM = 100_000
# Shares of the processor time of all steps, which hold on slow machines too. The first table is sorted three ways, a step each.
FIRST_SHARE, NEXT_SHARE = 0.6, 0.15


def entries(num: int, *, revision: int = 0, prefix: str = "adapter") -> list[AdapterEntry]:
    digests = [f"{7 * n + revision:064x}" for n in range(num)]
    return [
        AdapterEntry(name=f"{prefix}-{n:06}", labels={"latest": digest}, base_fingerprints={digest: "f"})
        for n, digest in enumerate(digests)
    ]


@pytest.fixture
def _without_collections() -> Iterator[None]:
    """Leave out what the collector does with the objects of other tests."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def longest_share(table: NameTable | AdapterNames, whole: Iterable[AdapterEntry]) -> float:
    """Take a table in; return the share of the processor time that its longest step had, or what is left at the end."""
    steps, began_s = [], time.thread_time()
    for _ in table.replacing(whole):
        steps.append(time.thread_time() - began_s)
        began_s = time.thread_time()
    steps.append(time.thread_time() - began_s)
    return max(steps) / sum(steps)


@pytest.mark.usefixtures("_without_collections")
@pytest.mark.parametrize("make", [NameTable, AdapterNames])
def test_no_step_of_a_hundred_thousand_names_takes_long(make: type[NameTable] | type[AdapterNames]) -> None:
    first, again = entries(NUM), entries(NUM)
    shares = []

    for _ in range(3):
        table = make()
        shares.append([longest_share(table, whole) for whole in (first, again, first[: NUM - 1000])])

    # The best of three: what else runs on the machine makes single steps longer, never shorter.
    best = [min(each) for each in zip(*shares, strict=True)]
    assert best[0] < FIRST_SHARE
    assert max(best[1:]) < NEXT_SHARE


def test_what_is_as_it_was_is_not_worked_out_again() -> None:
    table = NameTable()
    table.replace_all(entries(3 * SLICE_NAMES))
    before = table.blocks()

    table.replace_all(entries(3 * SLICE_NAMES))

    assert [new is old for new, old in zip(table.blocks(), before, strict=True)] == [True] * len(before)


def test_a_name_is_as_before_or_as_in_the_new_table_until_all_is_taken_in() -> None:
    table, num = NameTable(), 3 * SLICE_NAMES
    old, new = entries(num), [*entries(num // 2, revision=1), *entries(num, prefix="other")]
    table.replace_all(old)
    allowed = {entry.name: [dict(entry.labels)] for entry in old}
    for entry in new:
        allowed.setdefault(entry.name, []).append(dict(entry.labels))

    for _ in table.replacing(new):
        for block in table.blocks():
            for entry in table.entries_of(block):
                assert dict(entry.labels) in allowed[entry.name]

    assert names_of(table) == sorted(entry.name for entry in new)


def names_of(table: NameTable) -> list[str]:
    return [entry.name for block in table.blocks() for entry in table.entries_of(block)]


TABLES = st.dictionaries(st.text("ab/", min_size=1, max_size=4), st.integers(0, 2), max_size=20)


@given(TABLES, TABLES)
def test_a_replaced_table_is_as_a_new_one(before: dict[str, int], after: dict[str, int]) -> None:
    def whole(table: dict[str, int]) -> list[AdapterEntry]:
        return [AdapterEntry(name=name, labels={"latest": f"{number}"}) for name, number in table.items()]

    replaced, fresh = NameTable(), NameTable()
    replaced.replace_all(whole(before))
    replaced.replace_all(whole(after))
    fresh.replace_all(whole(after))
    told = AdapterNames()
    told.replace_all(whole(before))
    told.replace_all(whole(after))

    assert names_of(replaced) == names_of(fresh) == sorted(after)
    assert list(replaced._order.after()) == list(fresh._order.after())
    assert {digest: told.of(digest) for digest in "012"} == {
        digest: sorted(name for name, number in after.items() if f"{number}" == digest) for digest in "012"
    }
