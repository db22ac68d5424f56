"""The device tables of resident adapters: the place in the pool of each tile of each (adapter, layer, op).

The buffers are fixed, so that a captured graph outlives every load and unload. Rows are written through pinned copies
on the caller's current stream; the caller orders that stream before the first step that names the adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from loraplex_common.adapter_parts import KINDS, check_kinds
from loraplex_common.flora import FLORA
from loraplex_common.image_geometry import ImageError
from loraplex_common.low_rank import LOW_RANK, MAX_SLICES
from loraplex_common.part_kind import Matrices
from loraplex_common.rank_limits import CUDA_MAX_RANK
from loraplex_common.sparse_delta import SPARSE_DELTA
from loraplex_common.token_rows import ROWS
from loraplex_common.vectors import BIAS, IN_VECTOR, OUT_VECTOR

from loraplex_kernels.lora.entry_plan import entry_plan, undivided
from loraplex_kernels.lora.outside_tables import OutsideTables, check_outside, divided
from loraplex_kernels.lora.ranges import RangeAllocator

if TYPE_CHECKING:
    from loraplex_common.adapter_image import AdapterSpec, Geometry
    from numpy.typing import NDArray

COMPUTED_KINDS: Final = (LOW_RANK, OUT_VECTOR, IN_VECTOR, BIAS, SPARSE_DELTA, ROWS, FLORA)
"""Kinds of parts that kernels exist for."""
NO_KINDS: Final = frozenset[str]()
MAX_RANK: Final = CUDA_MAX_RANK  # kMaxRank of kernels built with LORAPLEX_CHAINS, of one projection
PLAIN_MAX_RANK: Final = 256  # kMaxRank of the others
MAX_STACKED_RANK: Final = MAX_SLICES * MAX_RANK  # of an op


class OpLimitError(ValueError):
    """The model fuses more projections than the kernels take; the message names op, number and limit."""


class RankLimitError(ValueError):
    """A module's rank exceeds what the kernels take; the message names layer, projection, rank and limit."""


def check_parts(spec: AdapterSpec) -> None:
    """Refuse an adapter whose parts the kernels cannot take.

    Raises:
        ImageError: If a module has a part that no kernel computes, or two that no kernel computes together.
        RankLimitError: If a module's rank exceeds `MAX_RANK`; ops of such modules stay within `MAX_STACKED_RANK`.
    """
    check_kinds(spec, COMPUTED_KINDS, "cuda")
    kinds = {size.kind for size in spec.sizes}
    if SPARSE_DELTA in kinds:
        _refuse_together(spec, IN_VECTOR, SPARSE_DELTA, "a factor on inputs and a sparse delta")
    if FLORA in kinds:
        _refuse_together(spec, LOW_RANK, FLORA, "a low-rank pair and FLoRA")
    for layer, projection, kind, size in spec.sizes:
        if kind == LOW_RANK and size > MAX_RANK:
            raise RankLimitError(
                f"layer {layer}: rank {size} ({projection}) exceeds the {MAX_RANK} that the CUDA kernels take for one "
                "projection"
            )


def _refuse_together(spec: AdapterSpec, first: str, second: str, what: str) -> None:
    """Refuse modules with two kinds of parts that our kernels do not compute in one module.

    e is applied to x where it lies, and S would read e * x. FLoRA replaces an output in which a pair's delta lies already.
    """
    for module in spec.modules:
        if {first, second} <= {part.kind for part in module.parts}:
            raise ImageError(
                f"layer {module.layer} {module.projection}: backend cuda does not compute {what} in one module"
            )


def check_ops(geometry: Geometry) -> None:
    """Refuse a model whose ops the kernels cannot take.

    Raises:
        OpLimitError: If an op has more than `MAX_SLICES` projections.
    """
    for op in geometry.decoder_ops:
        if len(op.projections) > MAX_SLICES:
            raise OpLimitError(
                f"op {op.name} fuses {len(op.projections)} projections ({', '.join(op.slices)}); the CUDA kernels take "
                f"{MAX_SLICES} of one op: use --backend torch"
            )


def make_entries(
    geometry: Geometry, spec: AdapterSpec, pages: NDArray[np.int32]
) -> tuple[dict[str, NDArray[np.void]], NDArray[np.int64]]:
    """Return an adapter's ``[layers, ops]`` entries, by each kind of part that it has, and its tiles' byte offsets in the pool.

    Tile numbers in the entries count from the adapter's first tile.

    Raises:
        ValueError: If pages are too few.
        RankLimitError: If a module's rank exceeds what the kernels take.
        ImageError: If a module has a part that no kernel computes.
    """
    check_parts(spec)
    check_outside(spec, geometry)
    plan = entry_plan(geometry, spec.sizes)
    if len(pages) < plan.num_pages:
        raise ValueError(f"adapter {spec.digest[:12]} needs {plan.num_pages} pages, got {len(pages)}")
    offsets = pages[plan.tiles["page"]].astype(np.int64) * geometry.page_bytes + plan.tiles["offset"]
    begins = undivided(plan, offsets)
    entries: dict[str, NDArray[np.void]] = {}
    for name, its in plan.kinds.items():
        kind = KINDS[name]
        rows = entries[name] = np.zeros((geometry.num_layers, len(geometry.ops)), dtype=kind.table_dtype)
        kind.write_entries(rows, Matrices(its.tiles, plan.firsts[its.matrices], begins[its.matrices]))
        parts = [part for module in spec.modules for part in module.parts if part.kind == name]
        kind.write_numbers(rows, its.places, parts)
    return entries, offsets


class AdapterTables:
    """Entries and tiles of up to ``max_adapters`` adapters.

    Attributes:
        geometry: Geometry of adapter images.
        tiles: int64 ``[tile_capacity]`` on the device; byte offsets in the pool.
        max_ranks: int32 ``[max_adapters, ops, 3]`` on the host; largest rank of each slice over the layers.
        max_stacked: int32 ``[max_adapters, ops]`` on the host; largest stacked rank over the layers.
        max_nonzeros: int32 ``[max_adapters, ops, 3]`` on the host; most non-zeros of each slice's sparse delta over the
            layers.
        max_flora: int32 ``[max_adapters, ops, 3]`` on the host; largest rank of each slice's FLoRA over the layers.
        has_part: By kind of part but pairs, bool ``[max_adapters, ops]`` on the host.
        has_others: bool ``[max_adapters]`` on the host; whether an adapter has any part but pairs in the layers.
        outside: What adapters have outside of the layers.
        is_wide: bool ``[max_adapters]`` on the host; whether an adapter has a rank above `PLAIN_MAX_RANK`.

    Raises:
        OpLimitError: If an op has more slices than the kernels take.
    """

    def __init__(self, geometry: Geometry, *, max_adapters: int, tile_capacity: int, device: torch.device) -> None:
        check_ops(geometry)
        self.geometry = geometry
        self._allocator = RangeAllocator(tile_capacity)
        self._ranges: dict[int, tuple[int, int]] = {}
        self._pinned = device.type == "cuda"
        num_ops = geometry.num_decoder_ops
        self._entries: dict[str, torch.Tensor] = {}
        for kind in KINDS.values():
            if kind.name == ROWS:
                continue
            shape = (max_adapters, geometry.num_decoder_layers, num_ops, kind.table_dtype.itemsize)
            spare = kind.table_dtype.itemsize  # kernels prefetch the entry behind the one they read
            storage = torch.zeros(int(np.prod(shape)) + spare, dtype=torch.uint8, device=device)
            self._entries[kind.name] = storage[:-spare].view(shape)
        self._op_indices = [geometry.op_indices(layer) for layer in range(geometry.num_decoder_layers)]
        self.tiles = torch.zeros(tile_capacity, dtype=torch.int64, device=device)
        self.max_ranks = np.zeros((max_adapters, num_ops, MAX_SLICES), dtype=np.int32)
        self.max_stacked = np.zeros((max_adapters, num_ops), dtype=np.int32)
        self.max_nonzeros = np.zeros((max_adapters, num_ops, MAX_SLICES), dtype=np.int32)
        self.max_flora = np.zeros((max_adapters, num_ops, MAX_SLICES), dtype=np.int32)
        self.has_part = {
            name: np.zeros((max_adapters, num_ops), dtype=np.bool_) for name in self._entries if name != LOW_RANK
        }
        self.has_others = np.zeros(max_adapters, dtype=np.bool_)
        self.outside = OutsideTables(geometry, self.tiles, max_adapters=max_adapters)
        self.is_wide = np.zeros(max_adapters, dtype=np.bool_)
        self._written: dict[int, frozenset[str]] = {}  # by index, kinds whose rows on the device are not blank

    @property
    def entries(self) -> torch.Tensor:
        """Entries of low-rank pairs, see `entries_of`."""
        return self._entries[LOW_RANK]

    def entries_of(self, kind: str) -> torch.Tensor:
        """Return the entries of a kind of part: uint8 ``[max_adapters, layers, ops, bytes of an entry]`` on the device."""
        return self._entries[kind]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The entries of all kinds."""
        return tuple(self._entries.values())

    @property
    def entry_stride(self) -> int:
        """Entries from one adapter to the next."""
        return self.geometry.num_decoder_layers * self.geometry.num_decoder_ops

    def op_index(self, layer: int, op: str) -> int:
        """Return the place in ``geometry.decoder_ops`` of a layer's op."""
        return self._op_indices[layer][op]

    def entry_address(self, layer: int, op_index: int, kind: str = LOW_RANK) -> int:
        """Return the device address of adapter 0's entry for a layer and op."""
        entries = self._entries[kind]
        return entries.data_ptr() + (layer * entries.shape[2] + op_index) * entries.shape[3]

    def bind(self, index: int, spec: AdapterSpec, pages: NDArray[np.int32]) -> None:
        """Write an adapter's rows on the current stream.

        Raises:
            RuntimeError: If the index is bound.
            ValueError: If the adapter does not fit its pages or the kernels; nothing is bound then.
            TableFullError: If the tile table is full; nothing is bound then.
        """
        if index in self._ranges:
            raise RuntimeError(f"index {index} is bound already")
        entries, offsets = make_entries(self.geometry, spec, pages)
        start = self._allocator.allocate(len(offsets))
        self._ranges[index] = (start, len(offsets))
        self._upload(self.tiles[start : start + len(offsets)], torch.from_numpy(offsets))
        for name, rows in entries.items():
            for field in KINDS[name].tile_fields:
                rows[field] += start
        inside, outside = divided(self.geometry, spec, entries)
        self._note_parts(index, spec, inside)
        self.outside.bind(index, outside, self._upload)
        for name, rows in inside.items():
            target = self._entries[name][index]
            self._upload(target, torch.from_numpy(rows.view(np.uint8).reshape(target.shape)))
        kinds = frozenset(inside)
        for name in self._written.get(index, NO_KINDS) - kinds:
            self._entries[name][index].zero_()
        self._written[index] = kinds

    def _note_parts(self, index: int, spec: AdapterSpec, entries: dict[str, NDArray[np.void]]) -> None:
        if (pairs := entries.get(LOW_RANK)) is not None:
            self.max_ranks[index] = pairs["rank"].max(axis=0)
            self.max_stacked[index] = pairs["stacked_rank"].max(axis=0)
        self.is_wide[index] = bool((self.max_ranks[index] > PLAIN_MAX_RANK).any())
        self.has_others[index] = len(entries) > (LOW_RANK in entries)
        if not self.has_others[index]:
            return
        for layer, projection, kind, _ in spec.sizes:
            if kind != LOW_RANK and layer != self.geometry.outside:
                self.has_part[kind][index, self.geometry.place(layer, projection)[0]] = True
        if (deltas := entries.get(SPARSE_DELTA)) is not None:
            self.max_nonzeros[index] = deltas["count"].max(axis=0)
        if (floras := entries.get(FLORA)) is not None:
            self.max_flora[index] = floras["rank"].max(axis=0)

    def unbind(self, index: int) -> None:
        """Forget an adapter; its rows on the device stay until the index is bound again, and no step names them.

        Raises:
            KeyError: If the index is not bound.
        """
        self._allocator.release(*self._ranges.pop(index))
        self.outside.unbind(index)
        self.max_ranks[index] = 0
        self.max_stacked[index] = 0
        for name in self._written[index]:
            if name != LOW_RANK:
                self.has_part[name][index] = False
        self.max_nonzeros[index] = 0
        self.max_flora[index] = 0

    def check_integrity(self) -> None:
        """Raise RuntimeError if the tile table's accounts do not add up."""
        self._allocator.check_integrity()

    def _upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source.pin_memory() if self._pinned else source, non_blocking=self._pinned)
