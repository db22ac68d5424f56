"""The device tables of what adapters have outside of the decoder layers: pairs and rows of the embedding and of lm_head.

They are apart from the tables of the layers, so that these lie, and are read, as if there was nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import torch
from loraplex_common.adapter_parts import KINDS
from loraplex_common.image_geometry import ImageError
from loraplex_common.low_rank import LOW_RANK, MAX_SLICES
from loraplex_common.projections import HEAD_OP
from loraplex_common.token_rows import ROWS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from loraplex_common.adapter_image import AdapterSpec, Geometry
    from numpy.typing import NDArray

OUTSIDE_KINDS: Final = (LOW_RANK, ROWS)
"""Kinds of parts that kernels compute outside of the decoder layers."""
OUTSIDE_MAX_RANK: Final = 256  # kMaxRank of kernels built for single adapters
EXPAND_OUTPUTS: Final = 8
"""The expand kernel writes so many outputs at a time."""


class OpTables(Protocol):
    """Entries of one or several ops for all adapters, as the kernels of pairs read them; see `AdapterTables`."""

    tiles: torch.Tensor
    max_ranks: NDArray[np.int32]
    max_stacked: NDArray[np.int32]

    @property
    def entry_stride(self) -> int:
        """Entries from one adapter to the next."""
        ...

    def op_index(self, layer: int, op: str) -> int:
        """Return the place of a layer's op among the ops."""
        ...

    def entry_address(self, layer: int, op_index: int, kind: str = LOW_RANK) -> int:
        """Return the device address of adapter 0's entry for a layer and op."""
        ...


def check_outside(spec: AdapterSpec, geometry: Geometry) -> None:
    """Refuse what an adapter has outside of the decoder layers, if the kernels cannot take it.

    Raises:
        ImageError: If so; the message names module and kind, or rank.
    """
    for layer, projection, kind, size in spec.sizes:
        if layer != geometry.outside:
            continue
        if kind not in OUTSIDE_KINDS:
            raise ImageError(
                f"{projection}: parts of kind {kind!r} are not computed outside of the decoder layers, only "
                f"{' and '.join(OUTSIDE_KINDS)}"
            )
        if kind == LOW_RANK and size > OUTSIDE_MAX_RANK:
            raise ImageError(
                f"{projection}: rank {size} exceeds the {OUTSIDE_MAX_RANK} that the CUDA kernels take outside of the decoder layers"
            )
        outputs = geometry.projection(layer, projection).out_features
        if kind == LOW_RANK and outputs % EXPAND_OUTPUTS:
            raise ImageError(
                f"{projection}: LoRA on {outputs} outputs, which {EXPAND_OUTPUTS} does not divide, is not computed by the CUDA kernels"
            )


def divided(
    geometry: Geometry, spec: AdapterSpec, entries: Mapping[str, NDArray[np.void]]
) -> tuple[dict[str, NDArray[np.void]], dict[str, NDArray[np.void]]]:
    """Return an adapter's entries, by kind ``[layers, ops]``, as those of the decoder's layers and, ``[ops]``, those outside."""
    layers, ops = geometry.num_decoder_layers, geometry.num_decoder_ops
    inside = {name: np.ascontiguousarray(rows[:layers, :ops]) for name, rows in entries.items() if name != ROWS}
    if all(layer != geometry.outside for layer, _, _, _ in spec.sizes):
        return inside, {}
    return inside, {name: rows[layers, ops:] for name, rows in entries.items() if name in OUTSIDE_KINDS}


class OutsideOp:
    """The entries of one op outside of the layers; see `OpTables`.

    Attributes:
        tiles: `AdapterTables.tiles`.
        max_ranks: int32 ``[max_adapters, 1, 3]`` on the host.
        max_stacked: int32 ``[max_adapters, 1]`` on the host.
        num_rows: int32 ``[max_adapters]`` on the host; rows that each adapter replaces.
        last_ids: int32 ``[max_adapters]`` on the host; the largest token among them, -1 without any.
    """

    def __init__(self, tables: OutsideTables, place: int, num_adapters: int) -> None:
        self._tables, self._place = tables, place
        self.tiles = tables.tiles
        self.max_ranks = np.zeros((num_adapters, 1, MAX_SLICES), dtype=np.int32)
        self.max_stacked = np.zeros((num_adapters, 1), dtype=np.int32)
        self.num_rows = np.zeros(num_adapters, dtype=np.int32)
        self.last_ids = np.full(num_adapters, -1, dtype=np.int32)

    @property
    def entry_stride(self) -> int:
        """Entries from one adapter to the next."""
        return self._tables.num_ops

    def op_index(self, layer: int, op: str) -> int:
        """Return 0: there is one op."""
        del layer, op
        return 0

    def entry_address(self, layer: int, op_index: int, kind: str = LOW_RANK) -> int:
        """Return the device address of adapter 0's entry."""
        del layer, op_index
        entries = self._tables.entries[kind]
        return entries.data_ptr() + self._place * entries.shape[2]

    def has_parts(self) -> NDArray[np.bool_]:
        """Return which adapters adapt the op, ``[max_adapters]``."""
        found: NDArray[np.bool_] = (self.max_stacked[:, 0] > 0) | (self.num_rows > 0)
        return found

    def note(self, index: int, entries: Mapping[str, NDArray[np.void]]) -> None:
        """Take note of an adapter's entries, by kind ``[ops]``; none forgets it."""
        pair, rows = entries.get(LOW_RANK), entries.get(ROWS)
        self.max_ranks[index, 0] = 0 if pair is None else pair[self._place]["rank"]
        self.max_stacked[index, 0] = 0 if pair is None else pair[self._place]["stacked_rank"]
        self.num_rows[index] = 0 if rows is None else rows[self._place]["count"]
        self.last_ids[index] = rows[self._place]["last_id"] if rows is not None and self.num_rows[index] else -1


class OutsideTables:
    """Entries of up to ``max_adapters`` adapters for the ops outside of the decoder layers.

    Attributes:
        tiles: `AdapterTables.tiles`.
        num_ops: Ops outside of the layers.
        entries: By kind, uint8 ``[max_adapters, ops, bytes of an entry]`` on the device.
        ops: By name, each op's entries.
        has_any: bool ``[max_adapters + 1]`` on the host; whether an adapter has any part here; the last entry, which stands for
            no adapter, is False.
    """

    def __init__(self, geometry: Geometry, tiles: torch.Tensor, *, max_adapters: int) -> None:
        outside = geometry.ops[geometry.num_decoder_ops :]
        self.tiles, self.num_ops = tiles, len(outside)
        self.entries: dict[str, torch.Tensor] = {}
        for name in OUTSIDE_KINDS:
            item = KINDS[name].table_dtype.itemsize
            shape = (max_adapters, self.num_ops, item)  # and a spare entry, as kernels prefetch the one behind theirs
            storage = torch.zeros((int(np.prod(shape)) + item), dtype=torch.uint8, device=tiles.device)
            self.entries[name] = storage[:-item].view(shape)
        self.ops = {op.name: OutsideOp(self, place, max_adapters) for place, op in enumerate(outside)}
        self.has_any = np.zeros(max_adapters + 1, dtype=np.bool_)
        self._written = np.zeros(max_adapters, dtype=np.bool_)  # whose rows on the device are not blank

    @property
    def head(self) -> OutsideOp | None:
        """The entries of lm_head, if the model offers it."""
        return self.ops.get(HEAD_OP)

    def bind(
        self,
        index: int,
        entries: Mapping[str, NDArray[np.void]],
        upload: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> None:
        """Write an adapter's rows.

        Args:
            index: Index of the adapter.
            entries: By kind, ``[ops]`` of its table entry, tiles numbered as in ``tiles``; kinds that it lacks may be missing.
            upload: Copies to the device.
        """
        if not entries and not self._written[index]:
            return
        for name, table in self.entries.items():
            rows = entries.get(name)
            if rows is None:
                table[index].zero_()
            else:
                values = np.ascontiguousarray(rows).view(np.uint8).reshape(tuple(table.shape[1:]))
                upload(table[index], torch.from_numpy(values))
        for op in self.ops.values():
            op.note(index, entries)
        self.has_any[index] = self._written[index] = bool(entries)

    def unbind(self, index: int) -> None:
        """Forget an adapter; its rows on the device stay until the index is bound again."""
        for op in self.ops.values():
            op.note(index, {})
        self.has_any[index] = False
