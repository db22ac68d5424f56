"""How products of few rows with FP8 weights are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex_kernels.products.fp8_cut import ROW_CLASSES, SHARED_BYTES, WIDE_MAX_ROWS, choose_cuts


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
