"""Fused products of a small random base model, and a pool to load adapters into, for the torch backend's arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from loraplex_common.adapter_image import AdapterSpec, Geometry, Tensors, pack
from loraplex_engine.model.layers import Dense
from loraplex_engine.runners.torch.adapter_table import AdapterTable
from support.decoder_shapes import OPS, decoder_geometry

if TYPE_CHECKING:
    from loraplex_engine.runners.torch.factors import FactorWriter
    from loraplex_engine.runners.torch.lora import LoraStep

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_LAYERS = 2
PLACES = [(layer, name) for layer in range(NUM_LAYERS) for names in OPS.values() for name in names]


def make_geometry(dtype: str, page_bytes: int = 4096) -> Geometry:
    return decoder_geometry(
        dtype=dtype,
        page_bytes=page_bytes,
        num_layers=NUM_LAYERS,
        hidden_size=96,
        intermediate_size=160,
        num_heads=3,
        num_kv_heads=1,
        head_dim=32,
    )


@dataclass(frozen=True)
class Base:
    """Fused products of the base model, and the weights and biases of the projections in them."""

    geometry: Geometry
    linears: list[dict[str, Dense]]
    weights: Mapping[tuple[int, str], np.ndarray]
    biases: Mapping[tuple[int, str], np.ndarray | None]


def make_base(geometry: Geometry, *, biased: bool, seed: int = 0) -> Base:
    dtype, rng = DTYPES[geometry.dtype], torch.Generator().manual_seed(seed)
    linears: list[dict[str, Dense]] = []
    weights, biases = {}, dict[tuple[int, str], np.ndarray | None]()
    for layer in range(NUM_LAYERS):
        linears.append({})
        for op, names in OPS.items():
            shapes = [geometry.projection(layer, name).shape for name in names]
            inputs, outputs = shapes[0][0], [shape[1] for shape in shapes]
            weight = (torch.randn(sum(outputs), inputs, generator=rng) / inputs**0.5).to(dtype)
            bias = (3 * torch.randn(sum(outputs), generator=rng)).to(dtype) if biased else None
            linears[layer][op] = Dense(weight, bias)
            for name, part in zip(names, torch.split(weight, outputs), strict=True):
                weights[layer, name] = part.float().numpy()
            for at, name in enumerate(names):
                biases[layer, name] = None if bias is None else torch.split(bias, outputs)[at].float().numpy()
    return Base(geometry, linears, weights, biases)


class Pool:
    """A pool whose bytes are NaN wherever no tile lies, and its free pages in random order."""

    def __init__(self, geometry: Geometry, num_pages: int) -> None:
        self.geometry = geometry
        self.pages = torch.full((num_pages, geometry.page_bytes), 0xFF, dtype=torch.uint8)
        self.values = self.pages.view(DTYPES[geometry.dtype]).view(-1)
        self.free = np.random.default_rng(0).permutation(num_pages).astype(np.int32).tolist()

    def load(self, spec: AdapterSpec, tensors: Tensors, writer: FactorWriter) -> AdapterTable:
        image = pack(self.geometry, spec, tensors)
        pages = np.array([self.free.pop() for _ in image], dtype=np.int32)
        self.pages[torch.from_numpy(pages.astype(np.int64))] = torch.from_numpy(image)
        table = AdapterTable(self.geometry, spec, pages, self.values)
        writer.write(spec.digest, table)
        return table


def project(base: Base, step: LoraStep, layer: int, op: str, x: torch.Tensor, *, feature_major: bool) -> torch.Tensor:
    linear = base.linears[layer][op]
    y = torch.empty(len(x), linear.out_features, dtype=x.dtype)
    if feature_major:
        x, y = x.t().contiguous().t(), y.t().contiguous().t()
    before = x.clone()
    step.project(layer, op, linear, x, y)
    assert torch.equal(x, before), "the input is changed"
    return y
