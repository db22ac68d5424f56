"""LoRA of rows that add several adapters up, or whose ranks exceed what `LoraDecode` takes; see `chain_items`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
import torch
from loraplex_common.request_limits import MAX_ADAPTERS

from loraplex_kernels.lora.chain_items import CHAIN_GROUP_INTS, CHAIN_RUN, build_chains
from loraplex_kernels.lora.decode import LoraDecode, StepItems
from loraplex_kernels.lora.items import ITEM_INTS, SHRINK_ROWS
from loraplex_kernels.lora.tables import MAX_RANK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_kernels.lora.chain_items import Terms
    from loraplex_kernels.lora.items import ItemRanges, OpShape
    from loraplex_kernels.lora.tables import AdapterTables
    from loraplex_kernels.module import KernelLibrary
    from loraplex_kernels.params import ExpandParams, LoraTables

CHAINS_MACRO: Final = "LORAPLEX_CHAINS"
MOST_FIXED_TERMS: Final = 1024
"""Terms that fixed buffers have room for, unless there are more rows: 38 MB of h at rank 512 and six planes."""


def fixed_terms(max_rows: int) -> int:
    """Return for how many terms of at most that many rows fixed buffers are made."""
    return max(max_rows, min(MAX_ADAPTERS * max_rows, MOST_FIXED_TERMS))


def max_chain_items(shapes: tuple[OpShape, ...], *, max_terms: int, max_rows: int) -> int:
    """Return an upper bound of the items of a step, whatever the ranks."""
    of_term = sum(len(shape.outputs) * (MAX_RANK // SHRINK_ROWS) * shape.num_planes for shape in shapes)
    of_row = sum(sum(-(-outputs // CHAIN_RUN) for outputs in shape.outputs) for shape in shapes)
    return of_term * max_terms + of_row * max_rows


class ChainItems(StepItems):
    """A step's items and its terms' factors on the device.

    Args:
        num_ops: Ops of the model.
        max_terms: Most terms of a step.
        max_rows: Most rows of a step.
        max_items: Most items of a step.
        device: Where they lie.
        grows: Larger steps get larger buffers; not for what a graph reads.

    Attributes:
        buffer: See `StepItems`.
        scales: fp32 ``[max_terms]``.
    """

    def __init__(
        self, *, num_ops: int, max_terms: int, max_rows: int, max_items: int, device: torch.device, grows: bool = False
    ) -> None:
        records = max_terms + max_rows * MAX_ADAPTERS
        super().__init__(
            num_ops=num_ops, max_rows=records, max_items=max_items, device=device, group_ints=CHAIN_GROUP_INTS
        )
        self._num_ops, self._grows = num_ops, grows
        self.scales = torch.zeros(max_terms, dtype=torch.float32, device=device)

    def holds(self, built: ItemRanges, num_terms: int) -> bool:
        """Tell whether a step fits the buffers, which are made larger for it if they may."""
        items = self.count(built)
        if built.num_groups <= self._max_groups and items <= self._max_items and num_terms <= len(self.scales):
            return True
        if self._grows:
            device = self.buffer.device
            self._max_groups = max(self._max_groups, built.num_groups)
            self._max_items = max(self._max_items, items)
            self._items_at = self._header_ints + self._max_groups * self._group_ints
            size = self._items_at + self._max_items * ITEM_INTS
            self.buffer = torch.zeros(size, dtype=torch.int32, device=device)
            self.scales = torch.zeros(max(len(self.scales), num_terms), dtype=torch.float32, device=device)
        return self._grows

    def upload_scales(self, scales: NDArray[np.float32]) -> None:
        """Copy the terms' factors to the device on the current stream."""
        host = torch.from_numpy(np.ascontiguousarray(scales, dtype=np.float32))
        self.scales[: len(scales)].copy_(host.pin_memory() if self._pinned else host, non_blocking=self._pinned)


class LoraChains(LoraDecode):
    """The LoRA kernels of rows with several adapters each: `LoraDecode`'s launches, whatever the number of adapters.

    h has a row for each term, and the factors on adapters are the items': ``scale`` of `expand_add` and `expand_delta` is
    not read.

    Args:
        library: Compiles and loads them.
        tables: The resident adapters.
        pool: uint8 ``[num_pages, page_bytes]``; the unified pool.
        shapes: Shapes of the model's ops, as the item builder has them.
        max_rows: Most rows of a step.
        max_terms: Most terms of a step.
        grows: Steps may have more rows and terms; what they are copied to is not fixed then.
    """

    DEFINES: ClassVar[tuple[str, ...]] = (CHAINS_MACRO,)
    EXPAND: ClassVar[str] = "lora_expand_chain"
    RANKS: ClassVar[int] = MAX_RANK

    def __init__(
        self,
        library: KernelLibrary,
        tables: AdapterTables,
        pool: torch.Tensor,
        shapes: tuple[OpShape, ...],
        *,
        max_rows: int,
        max_terms: int,
        grows: bool = False,
    ) -> None:
        most_items = 1 if grows else max_chain_items(shapes, max_terms=max_terms, max_rows=max_rows)
        super().__init__(library, tables, pool, shapes, max_rows=max_terms, max_items=0)
        self.items: ChainItems = ChainItems(
            num_ops=len(shapes),
            max_terms=max_terms,
            max_rows=max_rows,
            max_items=most_items,
            device=library.device,
            grows=grows,
        )

    @property
    def fixed_tensors(self) -> tuple[torch.Tensor, ...]:
        """Tensors whose addresses reach kernels through tables."""
        return (self.items.buffer, self.items.scales)

    def prepare_terms(self, terms: Terms, rows: NDArray[np.int32] | None = None) -> ItemRanges | None:
        """Build the items of a step and copy them to the device on the current stream; None if they do not fit.

        Args:
            terms: Terms of the rows.
            rows: int32 ``[N]``; the rows' numbers in activations, 0..N-1 if unset.
        """
        numbers = np.arange(terms.num_rows, dtype=np.int32) if rows is None else rows
        built = build_chains(self._shapes, terms, numbers, self._tables.max_ranks, self._tables.max_stacked)
        if not self.items.holds(built, len(terms.adapters)):
            return None
        self.items.upload(built)
        self.items.upload_scales(terms.scales)
        return built

    def scratch_for(self, num_terms: int, before: torch.Tensor) -> torch.Tensor:
        """Return an h with room for that many terms: ``before``, or a larger one."""
        planes, rows, width = before.shape
        if num_terms <= rows:
            return before
        return torch.empty((planes, num_terms, width), dtype=torch.float32, device=self._library.device)

    def shrink(self, layer: int, op: str, x: torch.Tensor, h: torch.Tensor, grid: int) -> None:
        """See `LoraDecode.shrink`; ``h[plane]`` has a row for each term."""
        self._library.check("h", h, torch.float32, -1, -1, -1)
        super().shrink(layer, op, x, h, grid)

    def _fill_lora(self, lora: LoraTables, layer: int, op_index: int, *, expand: bool) -> None:
        self._library.check("items", self.items.buffer, torch.int32, -1)
        super()._fill_lora(lora, layer, op_index, expand=expand)

    def _fill_expand(self, expand: ExpandParams, shape: OpShape, h: torch.Tensor, scale: torch.Tensor) -> None:
        del scale
        super()._fill_expand(expand, shape, h, self.items.scales)
