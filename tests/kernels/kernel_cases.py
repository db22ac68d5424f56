"""Random inputs for kernel tests: adapters in pages of a pool, popularity patterns, paged sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from loraplex_common.adapter_image import AdapterSpec, Geometry, ModuleSpec, layout, pack, to_bfloat16
from loraplex_kernels.reference import lora_delta
from numpy.typing import NDArray
from support.decoder_shapes import OPS, PROJECTIONS, decoder_geometry, pair_tensors

PATTERNS = ("same", "distinct", "uniform", "zipf", "skewed")


def make_geometry(
    *,
    dtype: str = "bfloat16",
    hidden: int = 256,
    inter: int = 512,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    layers: int = 2,
    page_bytes: int = 256 * 1024,
    vocab: int = 0,
) -> Geometry:
    return decoder_geometry(
        dtype=dtype,
        page_bytes=page_bytes,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=inter,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
    )


def make_adapters(pattern: str, rows: int, num_adapters: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Adapter of each row; about one row in eight has none, except in `same` and `distinct`."""
    if pattern == "same":
        return np.zeros(rows, dtype=np.int32)
    if pattern == "distinct":
        return rng.permutation(rows).astype(np.int32) % num_adapters
    weights = {
        "uniform": np.ones(num_adapters),
        "zipf": 1.0 / np.arange(1, num_adapters + 1),
        "skewed": np.where(np.arange(num_adapters) == 0, 8.0 * num_adapters, 1.0),
    }[pattern]
    chosen = rng.choice(num_adapters, rows, p=weights / weights.sum())
    return np.where(rng.random(rows) < 0.125, -1, chosen).astype(np.int32)


def round_to(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """Round to bf16 and back, or leave as is."""
    if dtype == "float32":
        return values
    return (to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)


@dataclass
class ResidentAdapter:
    """One adapter with its plain tensors, fp32 values that its dtype holds exactly."""

    spec: AdapterSpec
    pages: NDArray[np.int32]
    tensors: dict[tuple[int, str], tuple[NDArray[np.float32], NDArray[np.float32]]]


class AdapterPool:
    """A host pool with adapters packed at random pages, the rest poisoned."""

    def __init__(self, geometry: Geometry, num_pages: int, rng: np.random.Generator) -> None:
        self.geometry = geometry
        self.pages = rng.integers(0, 256, (num_pages, geometry.page_bytes), dtype=np.uint8)
        self._free = [int(page) for page in rng.permutation(num_pages)]
        self._rng = rng
        self.adapters: list[ResidentAdapter] = []

    def take(self, count: int) -> NDArray[np.int32]:
        taken, self._free = self._free[:count], self._free[count:]
        if len(taken) < count:
            raise ValueError("the test's pool is too small")
        return np.array(taken, dtype=np.int32)

    def add(self, ranks: dict[tuple[int, str], int]) -> ResidentAdapter:
        """Pack an adapter of these (layer, projection) -> rank."""
        rng, modules, tensors = self._rng, [], {}
        for layer, projection in sorted(ranks, key=lambda key: (key[0], *self.geometry.place(*key))):
            rank = ranks[layer, projection]
            columns, outputs = self.geometry.projection(layer, projection).shape
            modules.append(ModuleSpec.low_rank(layer, projection, rank, float(0.5 + rng.random())))
            a = round_to(
                rng.standard_normal((rank, columns), dtype=np.float32) / np.sqrt(columns).astype(np.float32),
                self.geometry.dtype,
            )
            b = round_to(
                rng.standard_normal((outputs, rank), dtype=np.float32) * np.float32(0.5 / np.sqrt(rank)),
                self.geometry.dtype,
            )
            tensors[layer, projection] = (a, b)
        spec = AdapterSpec(f"{len(self.adapters):064x}", tuple(modules))
        pages = self.take(layout(self.geometry, spec.sizes).num_pages)
        self.pages[pages] = pack(self.geometry, spec, pair_tensors(tensors))
        self.adapters.append(ResidentAdapter(spec, pages, tensors))
        return self.adapters[-1]

    def add_uniform(self, rank: int, projections: tuple[str, ...] = PROJECTIONS) -> ResidentAdapter:
        """Pack an adapter of one rank on all layers."""
        return self.add(
            {(layer, name): rank for layer in range(self.geometry.num_decoder_layers) for name in projections}
        )

    def delta(
        self, adapters: NDArray[np.int32], scales: NDArray[np.float32], x: torch.Tensor, layer: int, op: str
    ) -> torch.Tensor:
        """What LoRA adds to an op's output, fp32 ``[rows, outputs]``, on x's device."""
        widths = [self.geometry.projection(0, name).shape[1] for name in OPS[op]]
        out = torch.zeros(len(adapters), sum(widths), dtype=torch.float32, device=x.device)
        factors = torch.from_numpy(scales).to(x.device)[:, None]
        for index in {int(adapter) for adapter in adapters} - {-1}:
            rows = torch.from_numpy(np.flatnonzero(adapters == index)).to(x.device)
            resident, begin = self.adapters[index], 0
            scaling = {(m.layer, m.projection): m.scaling for m in resident.spec.modules}
            for name, width in zip(OPS[op], widths, strict=True):
                if (layer, name) in resident.tensors:
                    a, b = (torch.from_numpy(t).to(x.device) for t in resident.tensors[layer, name])
                    out[rows, begin : begin + width] = factors[rows] * lora_delta(x[rows], a, b, scaling[layer, name])
                begin += width
        return out


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 error; NaN in either gives infinity."""
    error = ((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")
