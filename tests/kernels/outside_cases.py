"""Adapters of the embedding and of lm_head in pages of a pool, and what they compute, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from loraplex_common.adapter_image import AdapterSpec, Tensors, layout, pack
from loraplex_common.low_rank import LOW_RANK
from loraplex_common.token_rows import ROWS
from loraplex_kernels import reference
from numpy.typing import NDArray
from support.random_outside import EMBED, HEAD, Outside, draw_outside

if TYPE_CHECKING:
    from loraplex_common.adapter_image import Geometry


@dataclass(frozen=True)
class OutsideAdapter:
    """One adapter: its spec, pages and tensors, fp32 values that their image entries hold exactly."""

    spec: AdapterSpec
    pages: NDArray[np.int32]
    tensors: Tensors

    def rows(self, layer: int, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        found = self.tensors.get((layer, module, ROWS))
        return None if found is None else (torch.from_numpy(found[0]), torch.from_numpy(found[1]))

    def pair(self, layer: int, module: str, scale: float) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        found = self.tensors.get((layer, module, LOW_RANK))
        if found is None:
            return None
        scaling = next(m.scaling for m in self.spec.modules if (m.layer, m.projection) == (layer, module))
        return torch.from_numpy(found[0]), torch.from_numpy(found[1]), scale * scaling


class OutsidePool:
    """A host pool with such adapters packed at random pages, the rest poisoned.

    Args:
        geometry: Geometry of their images.
        num_pages: Pages of the pool.
        rng: Draws pages.
    """

    def __init__(self, geometry: Geometry, num_pages: int, rng: np.random.Generator) -> None:
        assert geometry.outside is not None
        self.geometry, self.layer = geometry, geometry.outside
        self.pages = rng.integers(0, 256, (num_pages, geometry.page_bytes), dtype=np.uint8)
        self._free = [int(page) for page in rng.permutation(num_pages)]
        self.adapters: list[OutsideAdapter] = []

    def add(self, wanted: Outside) -> OutsideAdapter:
        """Pack an adapter."""
        spec, tensors = draw_outside(self.geometry, wanted, len(self.adapters))
        count = layout(self.geometry, spec.sizes).num_pages
        pages, self._free = np.array(self._free[:count], dtype=np.int32), self._free[count:]
        self.pages[pages] = pack(self.geometry, spec, tensors)
        self.adapters.append(OutsideAdapter(spec, pages, tensors))
        return self.adapters[-1]

    def embedding(self, adapter: int, scale: float, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of tokens of one adapter, -1 for none, fp32 ``[tokens, hidden]``."""
        if adapter < 0:
            return reference.adapted_embedding(ids, table)
        own = self.adapters[adapter]
        return reference.adapted_embedding(ids, table, own.rows(self.layer, EMBED), own.pair(self.layer, EMBED, scale))

    def logits(self, adapter: int, scale: float, x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Return the logits of tokens of one adapter, -1 for none, fp32 ``[tokens, columns]``."""
        if adapter < 0:
            return base.float()
        own = self.adapters[adapter]
        return reference.adapted_logits(x, base, own.rows(self.layer, HEAD), own.pair(self.layer, HEAD, scale))
