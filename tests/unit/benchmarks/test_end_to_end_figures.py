"""The figures beside ours: peers as the baselines have them, floors that can be recomputed by hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from loraplex_bench.end_to_end.bursts import BurstSize, peer_of
from loraplex_bench.end_to_end.cases import (
    ALL_LINEAR,
    MIXED,
    QKVO,
    default_limits,
    gpu_cases,
    kv_bytes,
    setup_of,
    side_by_side,
)
from loraplex_bench.end_to_end.traces import no_cliff_setups
from loraplex_bench.floors import adapter_bytes, burst_floor_s, kv_bytes_per_token, step_weight_bytes
from loraplex_bench.peers import best_added, best_end_to_end
from loraplex_bench.random_weights import RandomWeights
from loraplex_bench.results import Results, Row
from loraplex_bench.shapes import LLAMA2_7B, LLAMA3_8B, AdapterFamily, Shape
from loraplex_bench.weights import SharedWeights
from loraplex_client.workload import Measured, Trace, burst
from loraplex_engine.model.layers import TORCH_LINEARS
from loraplex_engine.model.linear import StoredLinear

if TYPE_CHECKING:
    from pathlib import Path

TRACE = "slora 200:1:20:1:60"


@pytest.mark.parametrize(
    ("shape", "family", "rates"),
    [
        (LLAMA2_7B, QKVO, {0: 7539.1, 1: 6709.3, 32: 6095.9, 128: 4561.4, 200: 3886.1, 7: None}),
        (LLAMA2_7B, MIXED, {0: 7539.1, 200: 2178.6, 32: None}),
        (LLAMA3_8B, ALL_LINEAR, {0: 9952.4, 32: 3160.6, 200: 2013.1}),
        (LLAMA3_8B, QKVO, {200: None}),
        (LLAMA2_7B, ALL_LINEAR, {32: None}),
    ],
)
def test_the_peer_of_a_burst_is_its_best_setting(
    shape: Shape, family: AdapterFamily, rates: dict[int, float | None]
) -> None:
    setup = setup_of(shape, family)

    assert {count: peer_of(setup, BurstSize(), count).value for count in rates} == rates
    assert peer_of(setup, BurstSize(num_requests=64), 200).value is None


def test_the_peer_of_the_trace_is_its_best_setting_of_each_figure() -> None:
    def best(column: str, count: int = 200, family: AdapterFamily = QKVO, lowest: bool = False) -> float | None:
        return best_end_to_end(LLAMA2_7B, family, TRACE, count, column, lowest=lowest).value

    assert best("slo_attainment_6s") == 0.61
    assert best("slo_attainment_6s", count=0) == 1.0
    assert best("slo_attainment_6s", family=MIXED) == 0.2092
    assert best("tpot_p50_ms", lowest=True) == 25.972


def test_the_peer_of_a_whole_step_is_the_least_time_added() -> None:
    where = {"model_or_shape": "llama2-7b", "M": "64", "popularity": "distinct"}

    floor, peer = best_added("decode_stack", where)

    assert (floor, peer) == (1706.55, ("sgl_v2", 3529.34))
    assert best_added("decode_stack", {**where, "M": "63"}) == (None, ("", None))


def test_bytes_are_those_of_the_baselines() -> None:
    assert adapter_bytes(LLAMA2_7B, QKVO, 0) == 32 * 2**20
    assert [adapter_bytes(LLAMA2_7B, MIXED, index) // 2**20 for index in range(4)] == [128, 64, 32, 16]
    assert adapter_bytes(LLAMA3_8B, ALL_LINEAR, 0) == 80 * 2**20
    assert kv_bytes_per_token(LLAMA2_7B) == 512 * 1024
    assert kv_bytes_per_token(LLAMA3_8B) == 128 * 1024
    assert step_weight_bytes(LLAMA2_7B) / 2.998e12 * 1e6 == pytest.approx(4406.96, rel=1e-3)  # decode_stack's floor


def test_the_floor_of_a_burst_grows_with_adapters_and_shrinks_with_room() -> None:
    def floor(num_adapters: int, max_num_seqs: int = 256) -> float:
        return burst_floor_s(LLAMA2_7B, QKVO, burst(num_adapters, 512), max_num_seqs)

    assert floor(0) < floor(1) < floor(32) < floor(200)
    assert floor(200, 512) < floor(200, 256) < floor(200, 64)
    assert floor(200) - floor(0) == pytest.approx(254 * 200 * 32 * 2**20 / 3.056e12)
    assert 6.5 < floor(0) < 7.2  # 2.2 s of prompts, 1.1 s of weights, 3.6 s of keys and values


def test_both_no_cliff_engines_have_the_same_pages_for_keys_and_values() -> None:
    base = setup_of(LLAMA2_7B, QKVO, 256, max_num_seqs=128)

    roomy, capped = no_cliff_setups(base, num_resident=64, kv_tokens=384)

    page = LLAMA2_7B.geometry.page_bytes
    kv_pages = 128 * 96
    assert roomy.pool_bytes // page - QKVO.total_pages(LLAMA2_7B, 256) == kv_pages
    assert capped.pool_bytes // page - QKVO.total_pages(LLAMA2_7B, 64) == kv_pages


def test_two_engines_fit_beside_one_copy_of_the_weights() -> None:
    for shape, family, num_seqs in ((LLAMA2_7B, QKVO, 128), (LLAMA3_8B, ALL_LINEAR, 256)):
        size = BurstSize(num_requests=256)
        on = side_by_side(shape, family, num_seqs, size).pool_bytes

        assert step_weight_bytes(shape) + on + kv_bytes(shape, num_seqs + 4, size) < 72e9


def test_default_limits_are_the_engines() -> None:
    limits = default_limits(LLAMA2_7B, QKVO).limits

    assert (limits.max_num_seqs, limits.max_num_batched_tokens, limits.max_model_len) == (512, 8192, 4096)
    assert limits.max_resident_adapters == 4096


def test_the_arena_holds_every_adapter() -> None:
    for setup in (setup_of(LLAMA2_7B, MIXED), setup_of(LLAMA3_8B, ALL_LINEAR, 7)):
        pages = [setup.family.num_pages(setup.shape, index) for index in range(setup.num_adapters)]

        assert (
            setup.family.total_pages(setup.shape, setup.num_adapters)
            == sum(pages)
            <= setup.engine_limits.num_arena_slots
        )


def test_every_case_says_what_it_does_in_time() -> None:
    for case in gpu_cases().values():
        assert case.about
        assert 0 < case.seconds <= 150  # those of several models, or of files that are written first


def test_attainment_counts_all_requests_and_waits_from_the_scheduled_arrival() -> None:
    trace = Trace.of(np.array([0.0, 1.0, 2.0, 3.0]), prompt_tokens=4, output_tokens=3)

    measured = Measured(
        trace=trace,
        due_s=trace.arrival_s,
        first_s=np.array([5.0, 8.0, 2.5, np.nan]),
        last_s=np.array([7.0, 9.0, 3.5, np.nan]),
        num_tokens=np.array([3, 3, 3, 0]),
        is_finished=np.array([True, True, True, False]),
        wall_s=10.0,
        failures=[],
    )

    assert measured.attainment(6.0) == 0.5
    assert measured.attainment(7.0) == 0.75
    assert measured.first_token_share(6.0) == 0.5
    assert measured.num_unfinished == 1
    assert measured.ttft_percentile(50) == 5.0
    assert measured.tpot_percentile(50) == 0.5
    assert measured.output_tokens_per_s == 0.9
    with pytest.raises(RuntimeError, match="1 of 4 requests are unfinished"):
        measured.require_complete()


def test_a_result_file_has_the_agreed_fields(tmp_path: Path) -> None:
    results = Results()
    results.add(Row(suite="end_to_end", case="a/b", metric="m", value=2.0, unit="tok/s", peer="p", peer_value=1.0))

    path = results.write(tmp_path, "engine", commit="abc")

    written = json.loads(path.read_text())
    assert set(written["meta"]) >= {"date", "commit", "gpu", "torch", "command"}
    assert set(written["rows"][0]) == {"suite", "case", "metric", "value", "unit", "floor", "peer", "peer_value"}


def test_a_result_file_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex_bench.results.time.strftime", lambda *_: "same")
    Results().write(tmp_path, "engine", commit="abc")

    with pytest.raises(FileExistsError):
        Results().write(tmp_path, "engine", commit="abc")


def test_better_is_above_one_whichever_way_a_unit_goes() -> None:
    def ratio(unit: str) -> float | None:
        return Row(suite="s", case="c", metric="m", value=4.0, unit=unit, peer="p", peer_value=2.0).ratio

    assert (ratio("tok/s"), ratio("share"), ratio("us"), ratio("s")) == (2.0, 2.0, 0.5, 0.5)


def test_engines_of_one_process_share_their_weights() -> None:
    weights = SharedWeights(RandomWeights(dtype=torch.float32, device=torch.device("cpu")))

    first, other = weights.read("a", (4, 4)), weights.read("b", (4, 4))
    parts = [StoredLinear(name=name, in_features=4, out_features=outputs) for name, outputs in (("c", 2), ("d", 3))]
    stacked = weights.linear(parts, TORCH_LINEARS)

    assert weights.read("a", (4, 4)) is first
    assert not torch.equal(first, other)
    assert weights.linear(list(parts), TORCH_LINEARS) is stacked
    assert (stacked.in_features, stacked.out_features) == (4, 5)
