"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex_common.sizes import format_size, parse_size, size_as_flag


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("512MiB", 512 * 2**20),
        (" 2 gib ", 2 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("0.1GB", 100_000_000),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1.MiB", "1,5GiB", "1e9", "5 apples", "1 Mi B", "\u0663"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


@given(st.integers(0, 2**50))
def test_plain_bytes_are_exact(num_bytes: int) -> None:
    assert parse_size(str(num_bytes)) == num_bytes


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (2**20, "1 MiB"), (3 * 2**29, "1.5 GiB"), (2**51, "2048 TiB")],
)
def test_sizes_are_written_for_people(num_bytes: int, expected: str) -> None:
    assert format_size(num_bytes) == expected


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(2**30, "1GiB"), (512 * 2**20, "512MiB"), (1536 * 2**20, "1536MiB"), (1500, "1500"), (0, "0")],
)
def test_a_size_is_shown_as_a_flag_takes_it(num_bytes: int, text: str) -> None:
    assert size_as_flag(num_bytes) == text


@given(st.integers(0, 2**50))
def test_what_is_shown_of_a_size_is_exact(num_bytes: int) -> None:
    assert parse_size(size_as_flag(num_bytes)) == num_bytes
