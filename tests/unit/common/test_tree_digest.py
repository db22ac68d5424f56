"""A digest of pieces is the same however the bytes are cut."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_common.tree_digest import PIECE_BYTES, piece_digests

DATA = np.random.default_rng(0).integers(0, 256, 2 * PIECE_BYTES + 12345, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("num_bytes", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, len(DATA)])
def test_each_piece_has_its_own_sha256(num_bytes: int) -> None:
    data = DATA[:num_bytes]
    pieces = [data[start : start + PIECE_BYTES] for start in range(0, num_bytes, PIECE_BYTES)]

    assert piece_digests(memoryview(data)) == b"".join(hashlib.sha256(piece).digest() for piece in pieces)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, len(DATA)), max_size=6).map(sorted))
def test_views_that_follow_each_other_have_the_digests_of_the_whole(cuts: list[int]) -> None:
    views = [memoryview(DATA)[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(DATA)], strict=True)]

    assert piece_digests(*views) == piece_digests(memoryview(DATA))
