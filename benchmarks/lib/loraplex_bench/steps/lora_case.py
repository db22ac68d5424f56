"""Adapters of one op in a pool, with the tensors that the kernels should find there: what kernel benchmarks run on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from loraplex_common.adapter_image import KIND_A, AdapterSpec, Geometry, ModuleSpec, layout
from loraplex_common.projections import gated_decoder_layer
from loraplex_kernels import reference
from loraplex_kernels.lora.items import op_shapes
from loraplex_kernels.lora.tables import AdapterTables

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE_BYTES: Final = 2 << 20


class LoraCase:
    """Adapters of one op, resident in a pool of random values; each layer is a set of weights.

    Args:
        device: Device that holds pool and tables.
        outs: The op as the baselines name it: ``qkv``, ``4096`` (o) or ``14336`` (gate alone).
        rank: Rank of all adapters, or ``mixed``: 64, 8, 16 and 32 in turn.
        num_adapters: Number of adapters.
        sets: Sets of weights, so that no call finds its own in the L2.

    Attributes:
        op: Name of the op.
        pool: uint8 ``[pages, page_bytes]``.
        op_index: Its place in ``geometry.ops``.
        tables: Tables of all adapters, adapter i at index i.
        shapes: Shapes of all ops.
    """

    def __init__(self, device: torch.device, outs: str, rank: str, num_adapters: int, sets: int) -> None:
        self.op, self.projections = {
            "qkv": ("qkv", ("q_proj", "k_proj", "v_proj")),
            "4096": ("o", ("o_proj",)),
            "14336": ("gate_up", ("gate_proj",)),
        }[outs]
        layer = gated_decoder_layer(
            hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=32, head_dim=128
        )
        self.geometry = Geometry.of((layer,) * sets, dtype="bfloat16", page_bytes=PAGE_BYTES)
        ranks = (64, 8, 16, 32) if rank == "mixed" else (int(rank),)
        self.specs, self.pages, begin = [], [], 0
        for index in range(num_adapters):
            r, scale = ranks[index % len(ranks)], 0.5 + 0.25 * (index % 4)
            modules = tuple(
                ModuleSpec.low_rank(layer, name, r, scale) for layer in range(sets) for name in self.projections
            )
            self.specs.append(AdapterSpec(f"{index:064x}", modules))
            count = layout(self.geometry, self.specs[-1].sizes).num_pages
            self.pages.append(np.arange(begin, begin + count, dtype=np.int32))
            begin += count
        self.pool = (torch.randn(begin * PAGE_BYTES // 2, device=device, dtype=torch.bfloat16) / 64).view(torch.uint8)
        self.pool = self.pool.view(begin, PAGE_BYTES)
        tiles = sum(len(layout(self.geometry, spec.sizes).tiles) for spec in self.specs)
        self.tables = AdapterTables(self.geometry, max_adapters=num_adapters, tile_capacity=tiles, device=device)
        for index, (spec, pages) in enumerate(zip(self.specs, self.pages, strict=True)):
            self.tables.bind(index, spec, pages)
        self.shapes = op_shapes(self.geometry)
        self.op_index = self.tables.op_index(0, self.op)
        self.sets = sets

    def matrices(self, index: int, layer: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield A ``[rank, columns]`` and B ``[outputs, rank]`` of each slice as the kernels should read them."""
        tiles = layout(self.geometry, self.specs[index].sizes).tiles
        tiles = tiles[tiles["layer"] == layer]
        read = {
            (int(t["kind"]), int(t["slice"]), int(t["start"])): self.pool[int(self.pages[index][t["page"]])][
                int(t["offset"]) : int(t["offset"]) + int(t["rows"] * t["cols"] * 2)
            ]
            .view(torch.bfloat16)
            .view(int(t["rows"]), int(t["cols"]))
            for t in tiles
        }
        stacked = torch.cat([value for key, value in read.items() if key[0] == KIND_A], dim=1)
        first = 0
        for part in range(len(self.projections)):
            b = torch.cat([value for key, value in read.items() if key[0] != KIND_A and key[1] == part])
            yield stacked[first : first + b.shape[1]], b
            first += b.shape[1]

    def expected(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return what adapter ``index`` of layer 0 adds for x ``[tokens, columns]``."""
        scale = self.specs[index].modules[0].scaling
        return torch.cat([reference.lora_delta(x, a, b, scale) for a, b in self.matrices(index, 0)], dim=-1)
