"""Rows of a matrix are compared with the base's a slice at a time, in the precision of the coarser of both."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_adapter_store.checkpoint import base_rows, row_sets, safetensors_file
from loraplex_adapter_store.checkpoint.base_rows import BaseRows
from loraplex_adapter_store.checkpoint.base_weights import BaseWeights
from loraplex_adapter_store.checkpoint.row_sets import RowSet
from loraplex_adapter_store.checkpoint.safetensors_file import Tensor, read_tensors
from support.safetensors_files import safetensors_bytes, write_safetensors

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

EMBED = "model.embed_tokens"
MIB = 2**20


def rows_of(directory: Path, values: NDArray[np.float32], dtype: str = "float32") -> BaseRows:
    write_safetensors(directory / "model.safetensors", {f"{EMBED}.weight": values}, dtype)
    return BaseRows(BaseWeights(directory), [EMBED, "lm_head"], is_tied=True)


def tensor(values: NDArray[np.float32], dtype: str = "float32") -> Tensor:
    return read_tensors(safetensors_bytes({"x": values}, dtype), file="x")["x"]


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_copy_in_any_dtype_changes_no_row(base_dtype: str, dtype: str, tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((50, 16), dtype=np.float32)
    stored = tensor(values, base_dtype).values().astype(np.float32)
    rows = rows_of(tmp_path, values, base_dtype)
    changed = stored.copy()
    changed[[4, 49]] += 0.5

    for path in (EMBED, "lm_head"):  # the files bring no lm_head: it is the embedding
        assert not rows.changed(path, tensor(stored, dtype), 50).any()
        assert np.flatnonzero(rows.changed(path, tensor(changed, dtype), 50)).tolist() == [4, 49]
        assert np.flatnonzero(rows.changed(path, tensor(np.vstack([stored, stored[:2]]), dtype), 50)).tolist() == [
            50,
            51,
        ]
        found = rows.changed_tokens(path, tensor(changed[[4, 7, 3]], dtype), [4, 7, 60], 50)
        assert found.tolist() == [True, False, True]


def test_a_change_that_only_fp32_holds_is_one(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, np.ones((4, 8), np.float32), "bfloat16")
    values = np.ones((4, 8), np.float32)
    values[2, 3] += 1e-6

    assert rows.changed(EMBED, tensor(values), 4).tolist() == [False, False, True, False]
    assert not rows.changed(EMBED, tensor(values, "bfloat16"), 4).any()


def test_matrices_are_read_in_slices_and_never_copied_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (base_rows, row_sets, safetensors_file):
        monkeypatch.setattr(module, "SLICE_ITEMS", 1 << 15)
    values = np.random.default_rng(2).standard_normal((32768, 128), dtype=np.float32)  # 16 MiB
    rows, ours = rows_of(tmp_path, values), tensor(values + np.float32(1), "float32")
    del values
    tracemalloc.start()
    try:
        differs = rows.changed(EMBED, ours, 32768)
        chosen = RowSet.of_matrix(ours, np.flatnonzero(differs))
        assert chosen.values.largest() > 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert differs.all()
    assert peak < 2 * MIB


@settings(max_examples=30, deadline=None)
@given(
    at=st.integers(0, 99), value=st.sampled_from([np.nan, np.inf, -7.0]), dtype=st.sampled_from(["float32", "bfloat16"])
)
def test_the_largest_value_is_found_in_any_slice(at: int, value: float, dtype: str) -> None:
    values = np.random.default_rng(at).uniform(-1, 1, 100).astype(np.float32)
    values[at] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_file, "SLICE_ITEMS", 7)
        found = tensor(values, dtype).largest()

    np.testing.assert_equal(found, abs(value))


@settings(max_examples=40, deadline=None)
@given(
    of_matrix=st.sets(st.integers(0, 29)),
    tokens=st.lists(st.integers(0, 29), unique=True),
    same=st.sets(st.integers(0, 29)),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_trained_tokens_take_the_place_of_a_matrix_rows(
    of_matrix: set[int], tokens: list[int], same: set[int], dtype: str
) -> None:
    rng = np.random.default_rng(3)
    matrix = tensor(rng.standard_normal((30, 8), dtype=np.float32), dtype)
    given_rows = tensor(rng.standard_normal((len(tokens), 8), dtype=np.float32))
    differs = np.array([token not in same for token in tokens], dtype=np.bool_)

    chosen = RowSet.of_matrix(matrix, np.array(sorted(of_matrix), dtype=np.intp)).replaced(tokens, given_rows, differs)

    expected = {row: matrix.values()[row] for row in of_matrix if row not in tokens}
    expected |= {token: given_rows.values()[i] for i, token in enumerate(tokens) if differs[i]}
    assert chosen.ids.tolist() == sorted(expected)
    if expected:
        np.testing.assert_array_equal(chosen.values.values(), [expected[row] for row in sorted(expected)])
