"""How products of few rows with FP8 weights are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex_kernels.products.fp8_cut import ROW_CLASSES, SHARED_BYTES, WIDE_MAX_ROWS, choose_cuts, dense_cuts


@given(outputs=st.integers(1, 40_000).map(lambda eighth: 8 * eighth), num_sms=st.integers(2, 160))
def test_cuts_fit_a_multiprocessor_and_keep_the_order_of_sums(outputs: int, num_sms: int) -> None:
    cuts = choose_cuts(outputs, num_sms)

    assert [cut.rows for cut in cuts] == list(ROW_CLASSES[: len(cuts)])
    assert len({(cut.parts, cut.cluster) for cut in cuts}) == 1
    for cut in cuts:
        assert cut.shared_bytes <= SHARED_BYTES[cut.ctas]
        assert cut.stages >= max(4, cut.parts)
        assert cut.threads * cut.ctas <= 1024


@pytest.mark.parametrize(("outputs", "most", "ctas"), [(4096, 128, 128), (6144, 128, 96), (28672, WIDE_MAX_ROWS, 224)])
def test_llama_3_8bs_products_fill_an_h200(outputs: int, most: int, ctas: int) -> None:
    cuts = choose_cuts(outputs, 132)

    of_64 = next(cut for cut in cuts if cut.rows == 64)
    assert cuts[-1].rows == most
    assert -(-outputs // of_64.outputs) * of_64.cluster == ctas


@pytest.mark.parametrize(("outputs", "rows"), [(8, 64), (66 * 64, 64), (66 * 64 + 8, 32), (28672, 32)])
def test_dense_products_take_as_many_rows_as_they_are_faster_with(outputs: int, rows: int) -> None:
    cuts = dense_cuts(outputs, 132)

    assert [cut.rows for cut in cuts] == [each for each in ROW_CLASSES if each <= rows]
    assert set(cuts) <= set(choose_cuts(outputs, 132))
