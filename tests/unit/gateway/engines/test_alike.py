"""Which numerics a base model's requests go to follows from the registry alone."""

from __future__ import annotations

import itertools

from loraplex_common.registry import EngineRecord
from loraplex_gateway.engines.alike import Alike, prevailing


def record(numerics: str, *, base: str = "llama", is_draining: bool = False, engine_id: str = "e") -> EngineRecord:
    return EngineRecord(
        engine_id=engine_id,
        target="",
        base_model=base,
        base_fingerprint=base,
        max_model_len=8,
        vocab_size=8,
        num_pages=8,
        block_tokens=8,
        page_bytes=8,
        max_image_pages=8,
        is_draining=is_draining,
        numerics=numerics,
    )


def test_most_engines_decide_for_their_base_model_in_whatever_order_they_come() -> None:
    fleet = [record("fp8"), record("fp8"), record("bf16"), record("fp32", base="qwen")]

    for order in itertools.permutations(fleet):
        assert prevailing(order) == {"llama": "fp8", "qwen": "fp32"}


def test_of_equally_many_the_first_in_order_decides_so_that_all_gateways_agree() -> None:
    assert prevailing([record("fp8"), record("bf16")]) == prevailing([record("bf16"), record("fp8")])


def test_engines_that_drain_do_not_count() -> None:
    assert prevailing([*[record("bf16", is_draining=True)] * 3, record("fp8")]) == {"llama": "fp8"}


def test_an_engine_of_an_earlier_version_is_alike_only_to_its_own_kind() -> None:
    alike = Alike()
    alike.update([record("", engine_id="old"), record("bf16", engine_id="1"), record("bf16", engine_id="2")])

    assert "unknown (an earlier version)" in alike.reason(record(""))
    assert alike.may_serve(record(""), "")
    assert not alike.may_serve(record(""), "bf16")
    assert not alike.may_serve(record("bf16"), "")


def test_a_stream_that_has_begun_stays_with_its_numerics_whatever_prevails() -> None:
    alike = Alike()
    alike.update([record("bf16"), record("fp8"), record("fp8")])

    assert [alike.may_serve(record(numerics), None) for numerics in ("bf16", "fp8")] == [False, True]
    assert [alike.may_serve(record(numerics), "bf16") for numerics in ("bf16", "fp8")] == [True, False]


def test_the_operator_can_allow_all() -> None:
    alike = Alike(allows_mixed=True)
    alike.update([record("bf16"), record("fp8"), record("fp8")])

    assert alike.reason(record("bf16")) == ""
    assert alike.may_serve(record("bf16"), None)
    assert alike.may_serve(record("bf16"), "fp8")
