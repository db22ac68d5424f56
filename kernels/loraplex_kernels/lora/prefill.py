"""LoRA for prefill chunks: tensor-core shrink and expand over ragged runs of tokens of one adapter, bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
from loraplex_common.request_limits import MAX_ADAPTERS

from loraplex_kernels.lora.items import ITEM_INTS, OpShape, within_runs
from loraplex_kernels.lora.prefill_cut import CLUSTERS, RESIDENCIES, choose_cut, num_shares
from loraplex_kernels.lora.prefill_shape import NARROW_STACKED_RANK, RANK_CLASSES, TILE_TOKENS, WHOLE_STEPS, Shape
from loraplex_kernels.lora.tables import MAX_STACKED_RANK, PLAIN_MAX_RANK
from loraplex_kernels.params import PrefillParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from loraplex_kernels.lora.tables import AdapterTables
    from loraplex_kernels.module import Kernel, KernelLibrary

BLOCK: Final = 256


def make_segments(adapters: NDArray[np.int32], counts: NDArray[np.int32], first_token: int) -> NDArray[np.int32]:
    """Cut consecutive chunks into tiles of at most 64 tokens of one adapter.

    Args:
        adapters: int32 ``[N]``; adapter of each chunk, -1 for none.
        counts: int32 ``[N]``; tokens of each chunk, one after another.
        first_token: Row of the first chunk's first token.

    Returns:
        int32 ``[tiles, 3]``: first token, tokens, adapter. Neighbouring chunks of one adapter share tiles; chunks
        without one have none.
    """
    starts = np.flatnonzero(np.diff(adapters, prepend=np.int32(-2)) != 0)
    totals = np.add.reduceat(counts, starts).astype(np.int64) if len(starts) else np.zeros(0, dtype=np.int64)
    begins = first_token + np.cumsum(totals) - totals
    owners = adapters[starts]
    totals = np.where(owners >= 0, totals, 0)
    tiles = -(-totals // TILE_TOKENS)
    run, within = np.repeat(np.arange(len(starts)), tiles), within_runs(tiles)
    segments = np.empty((len(run), 3), dtype=np.int32)
    segments[:, 0] = begins[run] + within * TILE_TOKENS
    segments[:, 1] = np.minimum(TILE_TOKENS, totals[run] - within * TILE_TOKENS)
    segments[:, 2] = owners[run]
    return segments


class OpPlan(NamedTuple):
    """One op's launch in a step.

    Attributes:
        first: Its first item.
        num_items: Items.
        shares: Into how many items a tile's outputs of a slice are cut; a power of two.
        cluster: CTAs of an item.
        ranks: One of `RANK_CLASSES`.
        ctas_per_sm: CTAs per SM of the kernel that takes it.
        num_more: Items of a second launch behind them: ranks above `PLAIN_MAX_RANK`.
    """

    first: int
    num_items: int
    shares: int
    cluster: int
    ranks: int
    ctas_per_sm: int
    num_more: int = 0


def plan_op(
    segments: NDArray[np.int32],
    ranks: NDArray[np.int32],
    shape: OpShape,
    clusters: tuple[int, ...],
    residencies: tuple[int, ...] = RESIDENCIES,
) -> tuple[OpPlan, NDArray[np.int32]]:
    """Return the launch of one op and its items: each tile's adapted slices, in as many shares as fill the GPU once.

    Args:
        segments: Segments from `make_segments`.
        ranks: int32 ``[tiles, slices]``; largest rank of each slice over the layers of the tiles' adapters.
        shape: Shape of the op.
        clusters: Sizes of cluster to choose from.
        residencies: Numbers of CTAs per SM to choose from.

    Returns:
        The plan, with `first` 0 and `ranks` for stacked ranks up to `WHOLE_STEPS`, and int32 ``[items, 4]``: first
        token, tokens, adapter, slice + 4 * share.
    """
    tile, part = np.nonzero(ranks)
    cluster, ctas_per_sm = choose_cut(len(tile), shape, clusters, residencies)
    shares = num_shares(len(tile), shape, cluster)
    rows = np.empty((len(tile), shares, ITEM_INTS), dtype=np.int32)
    rows[:, :, :3] = segments[tile, None]
    rows[:, :, 3] = part[:, None] + 4 * np.arange(shares)
    largest = int(ranks.max(initial=0))
    rank_class = next(each for each in RANK_CLASSES if largest <= each)
    plan = OpPlan(0, len(tile) * shares, shares, cluster, rank_class, ctas_per_sm)
    return plan, rows.reshape(-1, ITEM_INTS)


def split_ranks(
    items: NDArray[np.int32], ranks: NDArray[np.int32], shares: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return an op's items as the kernel of wide ranks takes them: the first `PLAIN_MAX_RANK` rank rows', then the others'.

    Args:
        items: From `plan_op`.
        ranks: As `plan_op` had them.
        shares: The plan's.
    """
    first = items.copy()
    first[:, 3] = (items[:, 3] & 3) + 8 * (items[:, 3] >> 2)
    second = first[np.repeat(ranks[np.nonzero(ranks)] > PLAIN_MAX_RANK, shares)]
    second[:, 3] += 4
    return first, second


class LoraPrefill:
    """The LoRA kernel of prefill chunks.

    Args:
        library: Compiles and loads it; bf16.
        tables: The resident adapters.
        pool: uint8 ``[num_pages, page_bytes]``; the unified pool.
        shapes: Shapes of the model's ops.
        max_items: Most items of a pass of a step.
        clusters: Sizes of cluster to choose from; those of the library's architecture if unset.
        residencies: Numbers of CTAs per SM to choose from.
    """

    def __init__(
        self,
        library: KernelLibrary,
        tables: AdapterTables,
        pool: torch.Tensor,
        shapes: tuple[OpShape, ...],
        *,
        max_items: int,
        clusters: tuple[int, ...] = (),
        residencies: tuple[int, ...] = RESIDENCIES,
    ) -> None:
        self._library, self._tables, self._shapes = library, tables, shapes
        self._kept = (pool,)  # kept alive: the kernels have its address
        self._pinned = library.device.type == "cuda"
        self.buffer = torch.zeros(2 * MAX_ADAPTERS * max_items * ITEM_INTS, dtype=torch.int32, device=library.device)
        self._clusters = clusters or (CLUSTERS if library.arch.startswith(("sm_9", "sm_1")) else (1,))
        self._residencies = residencies
        self._kernels = {
            (cluster, ranks, ctas): self._load(Shape.of(cluster, ranks, shapes, ctas), pool)
            for cluster in self._clusters
            for ranks in RANK_CLASSES
            for ctas in residencies
        }
        self._passes: list[list[OpPlan]] = []

    def _load(self, shape: Shape, pool: torch.Tensor) -> Kernel[PrefillParams]:
        kernel = self._library.load(
            "lora_prefill", PrefillParams(), BLOCK, defines=shape.defines, shared_bytes=shape.shared_bytes
        )
        lora = kernel.params.lora
        lora.pool, lora.tiles = pool.data_ptr(), self._tables.tiles.data_ptr()
        lora.entry_stride = self._tables.entry_stride
        return kernel

    def prepare(self, adapters: NDArray[np.int32], counts: NDArray[np.int32], first_token: int = 0) -> None:
        """Build a step's items and copy them to the device on the current stream; all layers use them.

        Args:
            adapters: int32 ``[N]``; adapter of each chunk, -1 for none.
            counts: int32 ``[N]``; tokens of each chunk, one after another.
            first_token: Row of the first chunk's first token.

        Raises:
            ValueError: If the items exceed the buffer.
        """
        self.prepare_passes([adapters], counts, first_token)

    def prepare_passes(
        self, passes: Sequence[NDArray[np.int32]], counts: NDArray[np.int32], first_token: int = 0
    ) -> None:
        """Build the items of a step whose chunks have several adapters, a pass for each place in their lists.

        Args:
            passes: int32 ``[N]`` for each pass; adapter of each chunk, -1 for none.
            counts: As `prepare` has them.
            first_token: The same.

        Raises:
            ValueError: If the items exceed the buffer.
        """
        parts, first = list["NDArray[np.int32]"](), 0
        self._passes = []
        for adapters in passes:
            plans, items = self._plan(make_segments(adapters, counts, first_token), first)
            self._passes.append(plans)
            parts += items
            first += sum(len(each) for each in items)
        built = np.concatenate(parts).reshape(-1)
        if len(built) > len(self.buffer):
            raise ValueError(f"{len(built)} ints of items exceed {len(self.buffer)}")
        host = torch.from_numpy(built)
        self.buffer[: len(built)].copy_(host.pin_memory() if self._pinned else host, non_blocking=self._pinned)

    def _plan(self, segments: NDArray[np.int32], first: int) -> tuple[list[OpPlan], list[NDArray[np.int32]]]:
        """Return the launches of one pass and their items, which lie from item ``first`` on."""
        ranks, stacked = self._tables.max_ranks[segments[:, 2]], self._tables.max_stacked[segments[:, 2]]
        plans, parts = [], []
        for op, shape in enumerate(self._shapes):
            of_op, highest = ranks[:, op, : len(shape.outputs)], int(stacked[:, op].max(initial=0))
            plan, items = plan_op(segments, of_op, shape, self._clusters, self._residencies)
            plan, own = plan._replace(first=first), [items]
            if plan.ranks > PLAIN_MAX_RANK or highest > NARROW_STACKED_RANK:
                own = list(split_ranks(items, of_op, plan.shares))
                plan = plan._replace(ranks=MAX_STACKED_RANK, num_more=len(own[1]))
            elif highest > WHOLE_STEPS:
                plan = plan._replace(ranks=NARROW_STACKED_RANK)
            plans.append(plan)
            parts += own
            first += plan.num_items + plan.num_more
        return plans, parts

    def apply(
        self, layer: int, op: str, x: torch.Tensor, scale: torch.Tensor, y: torch.Tensor, *, number: int = 0
    ) -> None:
        """Compute ``y[t] += scaling * scale[t] * (x[t] @ A.T) @ B.T`` for the step's chunks.

        Args:
            layer: Decoder layer.
            op: One of the layer's ops.
            x: ``[tokens, in_features]``.
            scale: fp32 ``[tokens]``.
            y: ``[tokens, out_features of all slices]``, updated in place.
            number: The pass.

        Raises:
            ValueError: If a shape, dtype or device differs.
        """
        index = self._tables.op_index(layer, op)
        shape, plan = self._shapes[index], self._passes[number][index]
        begin, check = shape.slice_begin, self._library.check
        kernel = self._kernels[plan.cluster, plan.ranks, plan.ctas_per_sm]
        params = kernel.params
        params.x = check("x", x, self._library.dtype, -1, shape.columns)
        params.scale = check("scale", scale, torch.float32, -1)
        params.y = check("y", y, self._library.dtype, -1, begin[-1])
        params.y_stride, params.columns, params.log_shares = begin[-1], shape.columns, plan.shares.bit_length() - 1
        params.slice_begin[:] = shape.kernel_slice_begin
        params.lora.entries = self._tables.entry_address(layer, index)
        params.lora.items = self.buffer.data_ptr() + 4 * ITEM_INTS * plan.first
        kernel.launch(plan.num_items * plan.cluster)
        if plan.num_more:
            params.lora.items += 4 * ITEM_INTS * plan.num_items
            kernel.launch(plan.num_more * plan.cluster)
