"""Names of blocks: equal exactly where keys and values are."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from loraplex_engine.messages import AdapterTerm
from loraplex_engine.pages.block_keys import KEY_BYTES, BlockKeys

tokens = st.lists(st.integers(0, 3), max_size=12)
digests = st.sampled_from([None, "a", "ab", "b"])
salts = st.sampled_from(["", "a", "b", "ab"])
scales = st.sampled_from([1.0, 0.5])
starts = st.sampled_from([None, 0, 1, 2, 3, 4, 7])
Named = tuple[list[int], str | None, float, str, int | None]


def names(
    token_ids: list[int],
    digest: str | None = None,
    scale: float = 1.0,
    salt: str = "",
    start: int | None = None,
    block_tokens: int = 2,
    numerics: str = "",
    more: tuple[AdapterTerm, ...] = (),
) -> list[bytes]:
    keys = BlockKeys(
        adapter_digest=digest,
        adapter_scale=scale,
        cache_salt=salt,
        block_tokens=block_tokens,
        numerics=numerics,
        adapter_start=start,
        more_adapters=more,
    )
    return list(keys.extend(np.array(token_ids, dtype=np.int32)))


@given(
    first=st.tuples(tokens, digests, scales, salts, starts), second=st.tuples(tokens, digests, scales, salts, starts)
)
def test_blocks_share_a_name_only_if_all_that_they_depend_on_is_equal(first: Named, second: Named) -> None:
    def depends_on(request: Named, block: int) -> object:
        token_ids, digest, scale, salt, start = request
        known = token_ids[: 2 * block + 2]
        if digest is None or (start is not None and 2 * block + 2 <= start):
            return known, salt  # the base model alone computes it
        return known, salt, digest, scale, start

    for (i, one), (j, other) in itertools.product(enumerate(names(*first)), enumerate(names(*second))):
        assert (one == other) == (depends_on(first, i) == depends_on(second, j))


terms = st.lists(st.builds(AdapterTerm, st.sampled_from(["a", "ab", "b"]), scales), min_size=1, max_size=3)


@given(first=st.tuples(tokens, terms, salts), second=st.tuples(tokens, terms, salts))
def test_blocks_of_several_adapters_share_a_name_only_if_adapters_order_and_weights_are_equal(
    first: tuple[list[int], list[AdapterTerm], str], second: tuple[list[int], list[AdapterTerm], str]
) -> None:
    def found(token_ids: list[int], listed: list[AdapterTerm], salt: str) -> list[bytes]:
        return names(token_ids, listed[0].digest, listed[0].scale, salt, more=tuple(listed[1:]))

    for (i, one), (j, other) in itertools.product(enumerate(found(*first)), enumerate(found(*second))):
        assert (one == other) == ((first[0][: 2 * i + 2], *first[1:]) == (second[0][: 2 * j + 2], *second[1:]))


def test_a_list_of_one_adapter_has_the_names_that_the_adapter_had_before_there_were_lists() -> None:
    (name,) = names([1, 2], digest="ab" * 32, scale=0.5, salt="tenant")

    assert name.hex() == "375799c5f2d6a31fe3d6e1778b68977a"


def test_an_adapter_has_no_name_in_common_with_the_base_whatever_it_touches() -> None:
    # Its digest is all that is known of it here: one that only touches `down` of layer 0 is as different as any.
    prompt = list(range(64))

    assert set(names(prompt)).isdisjoint(names(prompt, digest="only-down-of-layer-0"))


def test_only_full_blocks_have_names() -> None:
    assert [len(names(list(range(length)), block_tokens=4)) for length in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert all(len(name) == KEY_BYTES for name in names(list(range(8))))


@given(token_ids=tokens, cuts=st.lists(st.integers(0, 12), max_size=3))
def test_naming_a_sequence_as_it_grows_is_naming_it_at_once(token_ids: list[int], cuts: list[int]) -> None:
    growing = BlockKeys(adapter_digest=None, adapter_scale=1.0, cache_salt="", block_tokens=2)
    for cut in sorted(cuts):
        growing.extend(np.array(token_ids[:cut], dtype=np.int32))

    assert growing.extend(np.array(token_ids, dtype=np.int32)) == names(token_ids)


@given(token_ids=st.lists(st.integers(0, 3), min_size=2, max_size=8), digest=digests, salt=salts)
def test_blocks_of_other_numerics_have_other_names(token_ids: list[int], digest: str | None, salt: str) -> None:
    plain = names(token_ids, digest, salt=salt, numerics="bf16")
    assert plain == names(token_ids, digest, salt=salt, numerics="bf16")
    for other in ("", "bf16+kv:fp8", "fp32"):
        assert not set(plain) & set(names(token_ids, digest, salt=salt, numerics=other))
