"""Names of digests, as metrics list them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from loraplex_common.adapter_names import MAX_LISTED_BYTES, MAX_LISTED_NAMES, AdapterNames
from loraplex_common.alias_feed import AdapterEntry
from loraplex_common.exposition import private

DIGESTS = ("a" * 64, "b" * 64, "c" * 64)


def entry(
    name: str, labels: dict[str, str], *, tenants: tuple[str, ...] = (), is_deleted: bool = False
) -> AdapterEntry:
    return AdapterEntry(name=name, labels=labels, allowed_tenants=frozenset(tenants), is_deleted=is_deleted)


def test_a_digest_has_the_names_that_clients_can_ask_for_it_by() -> None:
    names = AdapterNames()
    a, b, c = DIGESTS

    names.update([entry("org/poet", {"latest": a, "prod": a, "old": b}), entry("twin", {"latest": a})])

    assert names.of(a) == ["org/poet", "org/poet:prod", "twin"]
    assert names.of(b) == ["org/poet:old"]
    assert names.of(c) == []
    assert names.listed([c, b, a, b]) == ["org/poet:old", "org/poet", "org/poet:prod", "twin"]


def test_a_moved_label_a_deleted_and_a_restricted_adapter_change_the_names_at_once() -> None:
    names = AdapterNames()
    a, b, _ = DIGESTS
    names.update([entry("x", {"latest": a}), entry("y", {"latest": a}), entry("z", {"latest": a})])

    names.update(
        [
            entry("x", {"latest": b}),
            entry("y", {"latest": a}, is_deleted=True),
            entry("z", {"latest": a}, tenants=("t",)),
        ]
    )

    assert names.of(a) == [private("z")]
    assert names.of(b) == ["x"]


def test_lists_are_bounded_in_names_and_in_bytes_and_keep_the_first() -> None:
    many, long = AdapterNames(), AdapterNames()
    many.update([entry(f"n{number:04}", {"latest": DIGESTS[0]}) for number in range(2000)])
    long.update([entry(f"{number:03}" + "x" * 125, {"l" * 128: DIGESTS[0]}) for number in range(400)])

    assert many.listed([DIGESTS[0]]) == [f"n{number:04}" for number in range(MAX_LISTED_NAMES)]
    listed = long.listed([DIGESTS[0]])
    assert 0 < len(",".join(listed)) <= MAX_LISTED_BYTES
    assert listed[0].startswith("000")


_ENTRIES = st.builds(
    entry,
    st.sampled_from(["p", "q", "p/q"]),
    st.dictionaries(st.sampled_from(["latest", "prod", "p"]), st.sampled_from(DIGESTS)),
    is_deleted=st.booleans(),
)


@given(st.lists(_ENTRIES, max_size=20))
def test_following_changes_comes_to_the_same_as_reading_the_whole_table(entries: list[AdapterEntry]) -> None:
    followed, read = AdapterNames(), AdapterNames()
    for change in entries:
        followed.update([change])

    read.replace_all({change.name: change for change in entries}.values())

    assert [followed.of(digest) for digest in DIGESTS] == [read.of(digest) for digest in DIGESTS]
