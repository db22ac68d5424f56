"""The norms that an engine reports are those of its base's projections, whatever op computes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from loraplex_common.base_model import load_base_model
from loraplex_common.projections import ops_of
from loraplex_engine.model import weight_norms as module
from loraplex_engine.model.layers import Dense
from loraplex_engine.runners.cuda.linears import CublasDense
from support.base_models import TinyBase, write_base_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("make", [Dense, CublasDense], ids=["torch", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_projection_has_the_norm_of_its_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: type[Dense | CublasDense], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(module, "SLICE_ITEMS", 1000)  # several slices for each projection
    info = load_base_model(write_base_model(tmp_path / "base", TinyBase()))
    geometry = info.geometry(dtype="float32", page_bytes=2**16)
    generator = torch.Generator().manual_seed(0)
    linears, expected = [], []
    for number, layer in enumerate(geometry.decoder_layers):
        weights = {
            each.name: (torch.randn(each.out_features, each.in_features, generator=generator) * (number + 1)).to(dtype)
            for each in layer
        }
        linears.append({op.name: make(torch.cat([weights[name] for name in op.slices])) for op in ops_of(layer)})
        expected += [float(np.linalg.norm(weights[each.name].double().numpy())) for each in layer]

    assert module.weight_norms(geometry, linears) == pytest.approx(expected, rel=1e-5)
