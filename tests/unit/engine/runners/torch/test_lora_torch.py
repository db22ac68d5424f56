"""LoRA straight from pool pages equals plain products, for any mix of ranks, slices, tiles and segments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from loraplex_common.adapter_image import AdapterSpec, Geometry, ModuleSpec, pack
from loraplex_common.projections import Projection
from loraplex_engine.runners.torch.adapter_table import AdapterTable
from loraplex_engine.runners.torch.lora import LoraStep
from loraplex_engine.runners.torch.segment import Segment
from support.decoder_shapes import OPS, decoder_geometry, pair_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_geometry(dtype: str, page_bytes: int) -> Geometry:
    return decoder_geometry(
        dtype=dtype,
        page_bytes=page_bytes,
        num_layers=2,
        hidden_size=320,
        intermediate_size=416,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
    )


def make_adapter(
    geometry: Geometry, modules: list[ModuleSpec], seed: int
) -> tuple[AdapterSpec, dict[tuple[int, str], tuple[np.ndarray, np.ndarray]], np.ndarray]:
    rng = np.random.default_rng(seed)
    tensors = {}
    for module in modules:
        inputs, outputs = geometry.projection(module.layer, module.projection).shape
        a = rng.standard_normal((module.rank, inputs)) / np.sqrt(inputs)
        b = rng.standard_normal((outputs, module.rank)) / np.sqrt(module.rank)
        tensors[module.layer, module.projection] = (a.astype(np.float32), b.astype(np.float32))
    spec = AdapterSpec(f"{seed:064x}", tuple(modules))
    return spec, tensors, pack(geometry, spec, pair_tensors(tensors))


ADAPTERS = [
    [
        ModuleSpec.low_rank(0, "q_proj", 3, 2.0),
        ModuleSpec.low_rank(0, "v_proj", 64, 0.25),
        ModuleSpec.low_rank(1, "down_proj", 17, 1.0),
    ],
    [ModuleSpec.low_rank(layer, name, 8, 4.0) for layer in (0, 1) for names in OPS.values() for name in names],
    [ModuleSpec.low_rank(1, "up_proj", 1, 3.0)],
]


@pytest.mark.parametrize("feature_major", [True, False])
@pytest.mark.parametrize("page_bytes", [8192, 65536])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_fused_projection_gets_its_adapters_part(dtype: str, page_bytes: int, *, feature_major: bool) -> None:
    geometry = make_geometry(dtype, page_bytes)
    adapters = [make_adapter(geometry, modules, seed) for seed, modules in enumerate(ADAPTERS)]
    num_pages = sum(len(image) for _, _, image in adapters) + 5
    free = np.random.default_rng(0).permutation(num_pages).astype(np.int32).tolist()
    pool = torch.full((num_pages, page_bytes), 0xFF, dtype=torch.uint8)  # NaN wherever a tile is not
    bounds = [(2, 5), (5, 6), (6, 10)]  # tokens [0, 2) have no adapter
    scales = [None, torch.tensor([0.5]), torch.tensor([1.0, 2.0, 0.0, -1.0])]
    tables = []
    for spec, _, image in adapters:
        pages = np.array([free.pop() for _ in image], dtype=np.int32)
        pool[torch.from_numpy(pages.astype(np.int64))] = torch.from_numpy(image)
        tables.append(AdapterTable(geometry, spec, pages, pool.view(DTYPES[dtype]).view(-1)))

    for layer in range(2):
        for op, names in OPS.items():
            inputs, outputs = (
                geometry.projection(0, names[0]).shape[0],
                [geometry.projection(0, n).shape[1] for n in names],
            )
            x, y = torch.randn(10, inputs).to(DTYPES[dtype]), torch.randn(10, sum(outputs)).to(DTYPES[dtype])
            expected = y.double()
            for (spec, tensors, _), (first, last), scale in zip(adapters, bounds, scales, strict=True):
                for module in spec.modules:
                    if module.layer == layer and module.projection in names:
                        a, b = (
                            torch.from_numpy(t).to(DTYPES[dtype]).double() for t in tensors[layer, module.projection]
                        )
                        start = sum(outputs[: names.index(module.projection)])
                        delta = module.scaling * (x[first:last].double() @ a.t()) @ b.t()
                        expected[first:last, start : start + b.shape[0]] += delta * (
                            1 if scale is None else scale[:, None]
                        )
            if feature_major:
                x, y = x.t().contiguous().t(), y.t().contiguous().t()
            segments = [
                [Segment(first=first, last=last, table=table, scales=scale)]
                for table, (first, last), scale in zip(tables, bounds, scales, strict=True)
            ]

            LoraStep(segments, DTYPES[dtype]).apply(layer, op, x, y)

            assert (y.double() - expected).abs().max() < (1e-4 if dtype == "float32" else 0.15)
            assert torch.equal(y[:2].double(), expected[:2])


def test_ops_of_one_name_may_differ_between_layers() -> None:
    layers = (
        (Projection("mlp.up_proj", "up", 64, 96), Projection("mlp.down_proj", "down", 96, 64)),
        (Projection("mlp.up_proj", "up", 64, 192), Projection("mlp.extra_proj", "extra", 64, 32)),
    )
    geometry = Geometry.of(layers, dtype="float32", page_bytes=8192)
    modules = [
        ModuleSpec.low_rank(layer, each.name, 4, 2.0) for layer, offered in enumerate(layers) for each in offered
    ]
    spec, tensors, image = make_adapter(geometry, modules, 0)
    table = AdapterTable(
        geometry, spec, np.arange(len(image), dtype=np.int32), torch.from_numpy(image).view(-1).view(torch.float32)
    )
    step = LoraStep([[Segment(first=0, last=3, table=table, scales=None)]], torch.float32)

    for layer, offered in enumerate(layers):
        for each in offered:
            x, y = torch.randn(3, each.in_features), torch.zeros(3, each.out_features)
            a, b = (torch.from_numpy(matrix) for matrix in tensors[layer, each.name])

            step.apply(layer, each.op, x, y)

            torch.testing.assert_close(y, 2.0 * x @ a.t() @ b.t(), rtol=1e-4, atol=1e-4)
    assert table.op(1, "down") is None
    assert table.op(0, "extra") is None
