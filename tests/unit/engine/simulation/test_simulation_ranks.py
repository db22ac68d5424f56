"""The simulator's engine of several ranks has the sizes of real ones, and its steps the terms that it states."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_common.adapter_image import layout, pair_sizes
from loraplex_common.base_model import load_base_model
from loraplex_engine.simulation.collectives import RankLink, StepCollectives
from loraplex_engine.simulation.devices import DEVICES, H100, rank_weight_bytes
from loraplex_engine.simulation.shapes import ALL_TARGETS, ModelShape, ShapeError, base_model
from loraplex_engine.simulation.step_cost import DECODE_ROW, StepCost
from support.base_models import TinyBase, write_base_model
from support.decoder_shapes import PROJECTIONS
from support.rank_rig import make_ranked_rig

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("degree", [2, 4])
def test_pages_weights_and_images_of_a_rank_are_those_of_real_ranks(tmp_path: Path, degree: int) -> None:
    info = load_base_model(write_base_model(tmp_path / "tiny", TinyBase(vocab_size=257)))
    rig: Any = make_ranked_rig(tmp_path / "tiny", degree)
    shape = ModelShape(info, "float32", tp_degree=degree)

    ranks = (rig.runner.runner, *rig.runner.followers)
    weights = [rank._model.weight_bytes for rank in ranks]
    geometry = rig.runner.geometry
    rig.runner.close()

    assert shape.weight_bytes == max(weights)
    assert shape.weight_bytes - min(weights) in (0, info.hidden_size * shape.item_bytes), "one token's row of lm_head"
    assert geometry == info.geometry(dtype="float32", page_bytes=shape.pool.page_bytes, tp_degree=degree)
    ranks_of = [(layer, name, 8) for layer in range(info.num_layers) for name in PROJECTIONS]
    assert shape.adapter(8, ALL_TARGETS).num_pages == layout(geometry, pair_sizes(ranks_of)).num_pages


def test_a_rank_has_more_than_its_share_of_an_adapter() -> None:
    info = base_model("llama2-7b")

    whole, part = (ModelShape(info, tp_degree=degree).adapter(16, ALL_TARGETS) for degree in (1, 2))

    assert part.weight_bytes / whole.weight_bytes == pytest.approx(0.684, abs=0.001)
    assert part.traffic_bytes < whole.traffic_bytes


def test_a_model_too_large_for_one_gpu_fits_several() -> None:
    info = base_model("llama3-70b")

    with pytest.raises(ShapeError, match=r"131\.\d GiB of weights, a h100 has 79 GiB: .*--tensor-parallel"):
        H100.pool_bytes(ModelShape(info))
    shape = ModelShape(info, tp_degree=4)
    assert H100.pool_bytes(shape) > 30 * 2**30
    assert rank_weight_bytes(shape) == pytest.approx(rank_weight_bytes(ModelShape(info)) / 4, rel=1e-6)


def test_ranks_that_cannot_divide_a_model_are_refused_by_name() -> None:
    with pytest.raises(ShapeError, match="llama3-70b over 3 ranks: num_heads 64 cannot be split over tp_degree 3"):
        ModelShape(base_model("llama3-70b"), tp_degree=3)


def test_keys_that_ranks_share_are_counted_on_each() -> None:
    info = base_model("llama3-8b")  # 32 heads, 8 of keys

    eight, sixteen = (ModelShape(info, tp_degree=degree) for degree in (8, 16))

    assert eight.kv_bytes_per_token == sixteen.kv_bytes_per_token, "one head of keys on each rank"


def test_a_step_of_several_ranks_adds_the_collectives_to_its_smaller_parts() -> None:
    info, rates = base_model("llama2-7b"), H100.rates
    link = RankLink(bytes_per_s=100e9, latency_s=10e-6)
    load = replace(DECODE_ROW, num_tokens=64, num_sampled=64, num_decode_rows=64, kv_tokens=64)

    cost = StepCost(ModelShape(info, tp_degree=2), rates, link)

    sums, hidden = 2 * 32 + 1, 4096 * 2
    by_hand = (sums + 2) * 10e-6 + sums * 64 * 2 * (1 / 2) * hidden / 100e9 + 64 * 16000 * 4 / 100e9
    assert cost.collective_s(load) == pytest.approx(by_hand)
    assert cost.seconds(load) < StepCost(ModelShape(info), rates).seconds(load)
    floor_s = ModelShape(info, tp_degree=2).weight_bytes * rates.weight_byte_s
    assert cost.seconds(DECODE_ROW) > floor_s + cost.collective_s(DECODE_ROW)


def test_one_rank_has_no_collectives_and_several_need_a_link() -> None:
    shape = ModelShape(base_model("llama2-7b"))

    assert StepCollectives(shape, H100.link).seconds(100, 10) == 0.0
    for device in DEVICES.values():
        assert StepCost(shape, device.rates, device.link).seconds(DECODE_ROW) == StepCost(shape, device.rates).seconds(
            DECODE_ROW
        )
    with pytest.raises(ValueError, match="2 ranks without a link"):
        StepCost(ModelShape(base_model("llama2-7b"), tp_degree=2), H100.rates)
