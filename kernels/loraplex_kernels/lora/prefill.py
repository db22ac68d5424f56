"""LoRA for prefill chunks: tensor-core shrink and expand over ragged runs of tokens of one adapter, bf16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
from loraplex_common.adapter_image import TILE_BYTES

from loraplex_kernels.lora.items import ITEM_INTS, OpShape, within_runs
from loraplex_kernels.lora.prefill_cut import CLUSTERS, RESIDENCIES, choose_cut, num_shares
from loraplex_kernels.lora.tables import MAX_RANK, MAX_STACKED_RANK
from loraplex_kernels.params import PrefillParams

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_kernels.lora.tables import AdapterTables
    from loraplex_kernels.module import Kernel, KernelLibrary

BLOCK: Final = 256
SM_SHARED_BYTES: Final = 228 * 1024  # of an H100's SM; each CTA takes 1 KiB more than it asks for
CTAS_PER_SM: Final = 3  # with the shortest ring
TILE_TOKENS: Final = 64  # kTokens
RANK_BLOCK: Final = 64  # kStep
WHOLE_STEPS: Final = TILE_BYTES // 128
"""Stacked rank up to which a tile of A holds the 64 columns of a step; above it 32, or 16 up to `MAX_STACKED_RANK`."""
RANK_CLASSES: Final = (16, 32, 64, MAX_RANK, MAX_STACKED_RANK)
"""Classes with a kernel each: by a slice's largest rank; the last one is for stacked ranks above `WHOLE_STEPS`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """How the kernel is cut; the macros of csrc/lora/prefill.cu.

    Attributes:
        cluster: CTAs of a work item.
        table: Most steps of 64 columns, and chunks of 64 outputs, of a CTA.
        ranks: Most rank rows of a block: 16, 32 or 64.
        blocks: Most blocks of 64 rank rows of a slice.
        parts: Parts of a step's columns, each within one tile of A.
        ctas_per_sm: CTAs that share a multiprocessor's shared memory.
    """

    cluster: int
    table: int
    ranks: int = RANK_BLOCK
    blocks: int = 1
    parts: int = 1
    ctas_per_sm: int = CTAS_PER_SM

    @classmethod
    def of(cls, cluster: int, ranks: int, shapes: tuple[OpShape, ...], ctas_per_sm: int) -> Shape:
        """Return the shape for a class of `RANK_CLASSES` of a model's ops."""
        return cls(
            cluster=cluster,
            table=table_size(shapes, cluster),
            ranks=min(ranks, RANK_BLOCK),
            blocks=-(-min(ranks, MAX_RANK) // RANK_BLOCK),
            parts=4 if ranks > MAX_RANK else 1,
            ctas_per_sm=ctas_per_sm,
        )

    @property
    def stages(self) -> int:
        """Slots of the ring: shared memory left with as many CTAs per SM as registers allow, one fewer above 64."""
        ctas = self.ctas_per_sm if self.blocks == 1 else min(self.ctas_per_sm, CTAS_PER_SM - 1)
        return (SM_SHARED_BYTES // ctas - 1024 - self._fixed_bytes) // self._slot_bytes

    @property
    def shared_bytes(self) -> int:
        """Size of the kernel's struct Shared, in bytes."""
        return -(-(self.stages * self._slot_bytes + self._fixed_bytes) // 8) * 8

    @property
    def _slot_bytes(self) -> int:
        return 128 * (TILE_TOKENS + self.ranks)

    @property
    def _fixed_bytes(self) -> int:
        """Bytes of partial sums, h, tables, scales and mbarriers."""
        exchanged = TILE_TOKENS * (4 * self.ranks + 128 * self.blocks + 4) + 16 * self.blocks
        return exchanged + (8 + 12 * self.parts) * self.table

    @property
    def defines(self) -> tuple[str, ...]:
        """The kernel's macros."""
        values = {
            "CLUSTER": self.cluster,
            "RANKS": self.ranks,
            "BLOCKS": self.blocks,
            "STAGES": self.stages,
            "TABLE": self.table,
            "PARTS": self.parts,
            "SHARED_BYTES": self.shared_bytes,
        }
        return tuple(f"{name}={value}" for name, value in values.items())


def table_size(shapes: tuple[OpShape, ...], cluster: int) -> int:
    """Return the most steps of 64 columns, or chunks of 64 outputs, that a CTA has."""
    longest = max(max(shape.columns, *shape.outputs) for shape in shapes)
    return -(-longest // 64) // cluster + 1


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
    """

    first: int
    num_items: int
    shares: int
    cluster: int
    ranks: int
    ctas_per_sm: int


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


class LoraPrefill:
    """The LoRA kernel of prefill chunks.

    Args:
        library: Compiles and loads it; bf16.
        tables: The resident adapters.
        pool: uint8 ``[num_pages, page_bytes]``; the unified pool.
        shapes: Shapes of the model's ops.
        max_items: Most items of a step.
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
        self.buffer = torch.zeros(max_items * ITEM_INTS, dtype=torch.int32, device=library.device)
        self._clusters = clusters or (CLUSTERS if library.arch.startswith(("sm_9", "sm_1")) else (1,))
        self._residencies = residencies
        self._kernels = {
            (cluster, ranks, ctas): self._load(Shape.of(cluster, ranks, shapes, ctas), pool)
            for cluster in self._clusters
            for ranks in RANK_CLASSES
            for ctas in residencies
        }
        self._plans: list[OpPlan] = []

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
        segments = make_segments(adapters, counts, first_token)
        ranks, stacked = self._tables.max_ranks[segments[:, 2]], self._tables.max_stacked[segments[:, 2]]
        self._plans, parts, first = [], [], 0
        for op, shape in enumerate(self._shapes):
            plan, items = plan_op(
                segments, ranks[:, op, : len(shape.outputs)], shape, self._clusters, self._residencies
            )
            is_narrow = stacked[:, op].max(initial=0) > WHOLE_STEPS
            self._plans.append(plan._replace(first=first, ranks=MAX_STACKED_RANK if is_narrow else plan.ranks))
            parts.append(items)
            first += plan.num_items
        built = np.concatenate(parts).reshape(-1)
        if len(built) > len(self.buffer):
            raise ValueError(f"{len(built)} ints of items exceed {len(self.buffer)}")
        host = torch.from_numpy(built)
        self.buffer[: len(built)].copy_(host.pin_memory() if self._pinned else host, non_blocking=self._pinned)

    def apply(self, layer: int, op: str, x: torch.Tensor, scale: torch.Tensor, y: torch.Tensor) -> None:
        """Compute ``y[t] += scaling * scale[t] * (x[t] @ A.T) @ B.T`` for the step's chunks.

        Args:
            layer: Decoder layer.
            op: One of the layer's ops.
            x: ``[tokens, in_features]``.
            scale: fp32 ``[tokens]``.
            y: ``[tokens, out_features of all slices]``, updated in place.

        Raises:
            ValueError: If a shape, dtype or device differs.
        """
        index = self._tables.op_index(layer, op)
        shape, plan = self._shapes[index], self._plans[index]
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
