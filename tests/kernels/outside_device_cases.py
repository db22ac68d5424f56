"""The kernels of the embedding and of lm_head of adapters, in the order of a step, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from kernels.host_kernels import HostLibrary
from kernels.kernel_cases import make_geometry
from kernels.outside_cases import OutsidePool
from loraplex_kernels.lora.decode import LoraDecode
from loraplex_kernels.lora.items import OpShape, make_groups
from loraplex_kernels.lora.tables import AdapterTables
from loraplex_kernels.lora.token_rows import EmbedRows, HeadRows
from loraplex_kernels.pointwise.embedding import Embedding
from support.random_outside import Outside

if TYPE_CHECKING:
    from loraplex_kernels.module import KernelLibrary
    from torch import Tensor

HIDDEN, VOCAB, ADDED, COLUMNS = 136, 1000, 24, 1024
MANY: Final = tuple(range(3, 990, 7))
"""Rows of more tokens than a block has threads, in several tiles."""
ADAPTERS: Final = (
    Outside(embed=(5, (7,)), head=(3, (2, 1003)), inner_rank=4),
    Outside(embed=(0, (*MANY, 1000, 1001, 1023)), head=(0, (*MANY, 1023))),
    Outside(embed=(16, ()), head=(16, ())),
    Outside(inner_rank=8),
    Outside(head=(0, (0, 1, 2, 998, 999))),
)


class OutsideRig:
    """Adapters of the embedding and of lm_head in tables, tokens and rows that name them.

    Args:
        library: Kernels.
        num_sms: Multiprocessors that lm_head's rows are shared out for.

    Attributes:
        token_adapters: int32 ``[tokens]``; adapter of each token of `embed`.
        known_ids: Their ids, those that were drawn too.
        row_adapters: int32 ``[rows]``; adapter of each row of `logits`.
    """

    def __init__(self, library: KernelLibrary, *, num_sms: int = 2) -> None:
        self.library, self.rng, self._num_sms = library, np.random.default_rng(5), num_sms
        dtype = "float32" if library.dtype == torch.float32 else "bfloat16"
        self.geometry = make_geometry(
            dtype=dtype, hidden=HIDDEN, heads=2, kv_heads=1, layers=1, page_bytes=16 * 1024, vocab=VOCAB
        )
        self.resident = OutsidePool(self.geometry, 600, self.rng)
        self.tables = AdapterTables(self.geometry, max_adapters=8, tile_capacity=4096, device=library.device)
        for index, wanted in enumerate(ADAPTERS):
            adapter = self.resident.add(wanted)
            self.tables.bind(index, adapter.spec, adapter.pages)
        self.pool = torch.from_numpy(self.resident.pages).to(library.device)
        self.embedding, self.head = (self.tables.outside.ops[name] for name in ("embed", "head"))
        if isinstance(library, HostLibrary):
            library.track(self.pool, self.tables.tiles, *self.tables.outside.entries.values())
        self.token_adapters = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 1, 2, 3, -1], dtype=np.int32)
        self.known_ids = [7, 8, 999, 3, 983, 4, 1000, 1023, 1010, 500, 17, 999, 7, 0]
        self.row_adapters = np.array([1, 0, -1, 1, 2, 4, 3, 0, *[1] * 9], dtype=np.int32)

    def randn(self, *shape: int) -> Tensor:
        """Return a random tensor on the host that the element type holds exactly."""
        return torch.from_numpy(self.rng.standard_normal(shape, dtype=np.float32)).to(self.library.dtype)

    def pairs(self, op: str, shape: OpShape, max_rows: int) -> tuple[LoraDecode, Tensor]:
        """Return the kernels of an op's pairs, and h, poisoned."""
        tables = self.tables.outside.ops[op]
        lora = LoraDecode(self.library, tables, self.pool, (shape,), max_rows=max_rows, max_items=256)
        h = torch.full(lora.scratch_shape, float("nan")).to(self.library.device)
        if isinstance(self.library, HostLibrary):
            self.library.track(lora.items.buffer, h)
        return lora, h

    def embed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return embeddings that kernels computed, those that they had to, on the host, and the ids that they left."""
        device, adapters, count = self.library.device, self.token_adapters, len(self.known_ids)
        given = [-1 if token in (10, 11) else known for token, known in enumerate(self.known_ids)]
        ids, slots = torch.tensor(given, dtype=torch.int32).to(device), torch.arange(count, dtype=torch.int32)
        last = torch.tensor(self.known_ids, dtype=torch.int32).to(device)  # slot = token
        base, scales = self.randn(VOCAB, HIDDEN), torch.linspace(0.5, 1.5, count)
        out = torch.full((count, HIDDEN), float("nan"), dtype=self.library.dtype).to(device)
        table, own_slots = base.to(device), slots.to(device)
        chosen, pairs = (np.flatnonzero(np.isin(adapters, each)).astype(np.int32) for each in ([0, 1, 2], [0, 2]))
        lora, h = self.pairs("embed", OpShape(columns=1024, outputs=(HIDDEN,)), count)
        tokens, owners = (torch.from_numpy(each).to(device) for each in (chosen, adapters[chosen]))

        rows = EmbedRows(self.library, self.embedding, self.pool, HIDDEN)
        rows.launch(tokens, owners, ids, own_slots, last, table, out, h)
        expand = int(lora.prepare(adapters[pairs], pairs).counts[1])
        lora.expand_add(0, "embed", h, scales.to(device), out, expand)
        Embedding(self.library, HIDDEN).launch(table, ids, own_slots, last, out)

        expected = [
            self.resident.embedding(adapter, scale, torch.tensor([known]), base)
            for adapter, scale, known in zip(adapters.tolist(), scales.tolist(), self.known_ids, strict=True)
        ]
        return out.cpu(), torch.cat(expected), ids.cpu()

    def logits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits that kernels computed, those that they had to, and those that were there before, on the host."""
        device, adapters, count = self.library.device, self.row_adapters, len(self.row_adapters)
        x, before, scales = self.randn(count, HIDDEN), self.randn(count, COLUMNS), torch.linspace(0.5, 1.5, count)
        before[:, VOCAB:] = float("-inf")
        found, own_x = before.clone().to(device), x.to(device)
        rows, pairs = (np.flatnonzero(np.isin(adapters, each)).astype(np.int32) for each in ([0, 1, 4], [0, 2]))
        lora, h = self.pairs("head", OpShape(columns=HIDDEN, outputs=(VOCAB,), row_columns=COLUMNS), count)
        groups = torch.from_numpy(make_groups(adapters[rows], rows)).to(device)

        shrink, expand = lora.prepare(adapters[pairs], pairs).counts.tolist()
        lora.shrink(0, "head", own_x, h, shrink)
        lora.expand_add(0, "head", h, scales.to(device), found, expand)
        kernel = HeadRows(self.library, self.head, self.pool, HIDDEN, num_sms=self._num_sms)
        kernel.launch(groups, int(self.head.num_rows.max()), own_x, found, VOCAB + ADDED)

        expected = [
            self.resident.logits(adapter, scale, x[row : row + 1], before[row : row + 1])
            for row, (adapter, scale) in enumerate(zip(adapters.tolist(), scales.tolist(), strict=True))
        ]
        return found.cpu(), torch.cat(expected), before
