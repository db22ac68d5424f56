"""Blocks of names: in order, of bounded size, and only the block of a changed name is replaced."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from loraplex_common.alias_feed import AdapterEntry
from loraplex_common.auth import Principal
from loraplex_gateway.adapters.name_blocks import MAX_NAMES, NameBlock, NameBlocks
from loraplex_gateway.adapters.names import NameTable

MANY = [f"adapter-{n:05}" for n in range(5_000)]
NAMES = st.sampled_from(["a", "ab", "b", "ba", "c", "m", "z", "zz", "0"])
CHANGES = st.lists(st.tuples(st.booleans(), NAMES), max_size=60)


def listed(blocks: list[NameBlock]) -> list[str]:
    return [name for block in blocks for name in block.names]


@given(CHANGES)
def test_whatever_changes_the_names_stay_in_order(changes: list[tuple[bool, str]]) -> None:
    blocks, model = NameBlocks(["b", "m"]), {"b", "m"}

    for is_there, name in changes:
        (blocks.changed if is_there else blocks.discard)(name)
        (model.add if is_there else model.discard)(name)

    assert listed(blocks.blocks()) == sorted(model)
    assert all(block.names for block in blocks.blocks())


def test_no_block_grows_beyond_its_bound() -> None:
    blocks = NameBlocks()

    for name in MANY:
        blocks.changed(name)

    assert listed(blocks.blocks()) == MANY
    assert max(len(block.names) for block in blocks.blocks()) <= MAX_NAMES


def test_a_change_replaces_one_block_and_leaves_a_list_that_was_taken_before_as_it_was() -> None:
    blocks = NameBlocks(MANY)
    before = blocks.blocks()

    blocks.changed(MANY[1234])
    blocks.changed("adapter-01234-b")
    blocks.discard(MANY[4000])

    assert listed(before) == MANY
    assert len(set(before) - set(blocks.blocks())) == 2


def test_a_list_may_begin_at_any_name() -> None:
    blocks = NameBlocks(MANY)

    for at in (MANY[0], MANY[777], MANY[-1], "a", "adapter-00777-b"):
        names = listed(blocks.blocks(at))
        assert [name for name in names if name >= at] == [name for name in MANY if name >= at]
        assert len(names) <= len([name for name in MANY if name >= at]) + MAX_NAMES


def test_a_page_of_a_caller_passes_over_whole_blocks_of_anothers_adapters() -> None:
    names = NameTable()
    names.replace_all(
        AdapterEntry(
            name=name, labels={"latest": "d"}, allowed_tenants=frozenset({"me" if name in MANY[-2:] else "vip"})
        )
        for name in MANY
    )
    asked: list[str] = []

    class Counted(dict[str, AdapterEntry]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.append(key)
            return super().get(key, default)

    names._entries = Counted(names._entries)
    me = Principal(name="me")
    assert [entry.name for entry in names.visible_to(me)] == MANY[-2:]  # works the readers out

    asked.clear()
    assert [entry.name for entry in names.visible_to(me)] == MANY[-2:]

    assert len(asked) <= MAX_NAMES
