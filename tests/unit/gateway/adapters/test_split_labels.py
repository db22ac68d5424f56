"""A split label gives each request one of its revisions: by weight, and the same for equal keys."""

from __future__ import annotations

from collections import Counter

from loraplex.v1 import adapter_pb2, adapter_store_pb2
from loraplex_common.alias_feed import entry_of
from loraplex_common.auth import Principal
from loraplex_gateway.adapters.names import NameTable
from loraplex_gateway.adapters.split_labels import share_of

A, B, C = "a" * 64, "b" * 64, "c" * 64
ME = Principal(name="me")
KEYS = [f"user-{number}" for number in range(20_000)]


def table() -> NameTable:
    """Return a table as the store tells it: `prod` is split, `latest` is not."""
    shares = [adapter_pb2.AliasShare(revision=B, weight=5), adapter_pb2.AliasShare(revision=A, weight=95)]
    told = adapter_store_pb2.WatchAliasesResponse.Entry(
        name="poet",
        aliases=[
            adapter_pb2.Alias(name="poet", label="prod", revision=A, shares=shares),
            adapter_pb2.Alias(name="poet", label="latest", revision=B),
        ],
        revisions=[adapter_pb2.AdapterRevision(revision=digest, base_fingerprint="f") for digest in (A, B)],
    )
    names = NameTable()
    names.replace_all([entry_of(told)])
    return names


async def resolve(text: str, key: str = "") -> str:
    (found,) = await table().resolve_all({"adapter": text}, caller=ME, patience_s=0.0, sticky_key=key)
    return found.digest


async def test_a_split_label_gives_equal_keys_one_revision_and_all_keys_both() -> None:
    names = table()
    found = Counter[str]()
    for key in KEYS[:2000]:
        first, again = [
            (await names.resolve_all({"adapter": "poet:prod"}, caller=ME, patience_s=0.0, sticky_key=key))[0].digest
            for _ in range(2)
        ]
        assert first == again
        found[first] += 1
    assert set(found) == {A, B}
    assert 60 <= found[B] <= 140  # 5 % of 2000, four standard deviations


async def test_other_labels_and_revisions_are_never_split() -> None:
    for key in KEYS[:200]:
        assert await resolve("poet", key) == await resolve("poet:latest", key) == await resolve(f"poet@{B}", key) == B
        assert await resolve(f"poet@{A[:8]}", key) == A


async def test_without_a_key_a_split_label_means_its_largest_share() -> None:
    assert await resolve("poet:prod") == A


def test_a_change_of_weights_moves_only_the_keys_between_the_borders() -> None:
    def all_of(weight: int) -> list[str]:
        shares = ((A, 100 - weight), (B, weight))
        return [share_of(shares, label="poet:prod", sticky_key=key) for key in KEYS]

    before, after = all_of(5), all_of(20)

    moved = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {(A, B)}
    assert 0.13 < len(moved) / len(KEYS) < 0.17


def test_shares_are_as_large_as_their_weights_and_labels_split_apart() -> None:
    shares = ((A, 1), (B, 2), (C, 7))
    found = [share_of(shares, label="poet:prod", sticky_key=key) for key in KEYS]
    other = [share_of(shares, label="poet:canary", sticky_key=key) for key in KEYS]

    for digest, weight in shares:
        assert abs(found.count(digest) / len(KEYS) - weight / 10) < 0.015
    assert found != other
