"""The benchmark of kinds of adapters makes adapters that the kernels take, and measures each kind once."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_bench.results import Results
from loraplex_bench.steps.kind_bench import DrySteps
from loraplex_bench.steps.kind_measurement import KINDS, Measurement, tiny_shape
from loraplex_bench.steps.part_images import DENSITY, DORA, FLORA, HEAD, IA3, LORA, SHIRA, kind_images
from loraplex_kernels.lora.tables import check_parts


def test_every_kind_is_measured_and_the_bars_are_beside_their_figures() -> None:
    shape, results = tiny_shape(), Results()
    images = kind_images(shape.geometry)

    Measurement(DrySteps(shape, images, 8 * len(KINDS)), results, shape, images, rows=8).run()

    steps = [row.case for row in results.rows if row.metric == "step"]
    assert steps == [
        f"tiny/{rows}"
        for rows in (
            "8 rows/no adapter",
            f"1 rows/{LORA}",
            f"4 rows/{LORA}",
            f"8 rows/{LORA}",
            f"8 rows/{DORA}",
            f"8 rows/{SHIRA}",
            f"8 rows/{IA3}",
            "8 rows/mixed",
            f"1 rows/{FLORA}",
            f"8 rows/{FLORA}",
            f"8 rows/one {FLORA}, others without",
            f"8 rows/{HEAD}",
        )
    ]
    bars = {row.metric: row.floor for row in results.rows if row.unit == "share" and row.floor is not None}
    assert bars == {"of LoRA's step": 1.1, "of its bar": 1.0, "p99 of alone": 1.2}


def test_the_adapters_are_of_their_kinds_and_served_by_the_kernels() -> None:
    shape = tiny_shape()
    images = kind_images(shape.geometry)
    size = sum(int(np.prod(each.shape)) for layer in shape.geometry.decoder_layers for each in layer)

    for image in images.values():
        check_parts(image.spec(7))
    assert images[SHIRA].num_nonzeros == pytest.approx(DENSITY * size, rel=0.05)
    assert {part.kind for module in images[DORA].modules for part in module.parts} == {"low_rank", "out_vector"}
    assert {module.projection for module in images[IA3].modules} == {"k_proj", "v_proj", "down_proj"}
    outside = [module for module in images[HEAD].modules if module.layer == shape.geometry.outside]
    assert [(m.projection, [part.kind for part in m.parts]) for m in outside] == [
        ("embed_tokens", ["rows"]),
        ("lm_head", ["low_rank", "rows"]),
    ]
