"""A step's inputs as one int32 buffer: filled on the host with numpy, sent with one copy, read by kernels in place.

Decode steps are padded to their bucket, whose layout never changes, so that a captured graph finds every array where it
was at capture. Steps with prefill chunks are laid out as large as they are.

Legend: T = tokens, N = rows (sequences), W = width of the block tables, S = sampling rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_engine.step import StepPlan

ALIGN_INTS: Final = 64  # arrays begin on 256 bytes
TILE_INTS: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """Sizes of a step's arrays.

    Attributes:
        num_tokens: T; in a decode bucket, its size.
        num_rows: N.
        width: W.
        num_samples: S.
        num_tiles: Tiles of prefill attention.
    """

    num_tokens: int
    num_rows: int
    width: int
    num_samples: int
    num_tiles: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """A step's arrays on the device.

    Attributes:
        token_ids: int32 ``[T]``; -1 takes the token last sampled for the slot.
        slots: int32 ``[T]``; slot of each token's sequence.
        positions: int32 ``[T]``.
        kv_slots: int32 ``[T]``; page * block_tokens + token in page; -1 for padding.
        sequences: int32 ``[T]``; row of the block tables; -1 for padding.
        contexts: int32 ``[T]``; tokens seen, the new one included; 0 for padding. One per decode row comes first.
        scales: fp32 ``[T]``; the request's own factor on its adapter.
        sample_tokens: int32 ``[S]``; tokens whose logits are sampled, each once; -1: padding.
        sample_slots: int32 ``[S]``.
        tiles: int32 ``[tiles, 8]``.
        block_tables: int32 ``[N, W]``.
    """

    token_ids: Tensor
    slots: Tensor
    positions: Tensor
    kv_slots: Tensor
    sequences: Tensor
    contexts: Tensor
    scales: Tensor
    sample_tokens: Tensor
    sample_slots: Tensor
    tiles: Tensor
    block_tables: Tensor


class InputLayout:
    """The place of each array of a step in the buffer.

    Attributes:
        size: Number of ints in all.
        tables_at: First int of the block tables, which come last so that unused rows need not be sent.
    """

    def __init__(self, shape: StepShape) -> None:
        self.shape = shape
        tokens, samples = (shape.num_tokens,), (shape.num_samples,)
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.size = 0
        for name in ("token_ids", "slots", "positions", "kv_slots", "sequences", "contexts", "scales"):
            self._place(name, tokens)
        self._place("sample_tokens", samples)
        self._place("sample_slots", samples)
        self._place("tiles", (shape.num_tiles, TILE_INTS))
        self.tables_at = self.size
        self._place("block_tables", (shape.num_rows, shape.width))

    def _place(self, name: str, shape: tuple[int, ...]) -> None:
        self._places[name] = (self.size, shape)
        self.size += -(-int(np.prod(shape)) // ALIGN_INTS) * ALIGN_INTS

    def host(self, buffer: NDArray[np.int32], name: str) -> NDArray[np.int32]:
        """Return one array of a host buffer."""
        begin, shape = self._places[name]
        return buffer[begin : begin + int(np.prod(shape))].reshape(shape)

    def views(self, buffer: Tensor) -> StepInputs:
        """Return all arrays of a device buffer, int32 ``[>= size]``."""
        arrays = {
            name: buffer[begin : begin + int(np.prod(shape))].view(shape)
            for name, (begin, shape) in self._places.items()
        }
        arrays["scales"] = arrays["scales"].view(torch.float32)
        return StepInputs(**arrays)


def is_pure_decode(plan: StepPlan) -> bool:
    """Tell whether every row is a decode row that samples, which is what the graphs compute."""
    return plan.num_decode_rows == len(plan.slots) == len(plan.sample_rows)


class InputWriter:
    """Fills host buffers with plans.

    Args:
        block_tokens: Tokens of a KV page.
        pad_slot: The slot that padding samples into; no request has it.
    """

    def __init__(self, *, block_tokens: int, pad_slot: int) -> None:
        self._block_tokens = block_tokens
        self._pad_slot = pad_slot

    def write_decode(self, layout: InputLayout, buffer: NDArray[np.int32], plan: StepPlan) -> int:
        """Fill a decode bucket and return how many ints must be sent."""
        count, used = len(plan.slots), plan.block_tables.shape[1]
        positions, size = plan.starts, self._block_tokens
        blocks = positions // size
        pages = plan.block_tables[np.arange(count), blocks]
        ordinals = np.arange(count, dtype=np.int32)
        for name, values, padding in (
            ("token_ids", plan.token_ids, 0),
            ("slots", plan.slots, self._pad_slot),
            ("positions", positions, 0),
            ("kv_slots", pages * size + positions - blocks * size, -1),
            ("sequences", ordinals, -1),
            ("contexts", positions + 1, 0),
            ("scales", plan.adapter_scales.view(np.int32), 0),
            ("sample_tokens", ordinals, -1),
            ("sample_slots", plan.slots, self._pad_slot),
        ):
            array = layout.host(buffer, name)
            array[:count] = values
            array[count:] = padding
        layout.host(buffer, "block_tables")[:count, :used] = plan.block_tables
        return layout.tables_at + count * layout.shape.width

    def write_mixed(
        self, layout: InputLayout, buffer: NDArray[np.int32], plan: StepPlan, tiles: NDArray[np.int32]
    ) -> int:
        """Fill the buffer of a step with prefill chunks and return how many ints must be sent.

        Row r has ``lengths[r]`` tokens; the same tokens are, in the step and in the row's sequence:

            [ends[r] - lengths[r], ends[r])            numbers of the step's tokens
            [starts[r], starts[r] + lengths[r])        positions in the sequence
        """
        lengths, size = plan.num_tokens, self._block_tokens
        row = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        ends = np.cumsum(lengths)
        positions = plan.starts[row] + np.arange(len(row), dtype=np.int32) - (ends - lengths)[row]
        blocks = positions // size
        arrays = {
            "token_ids": plan.token_ids,
            "slots": plan.slots[row],
            "positions": positions,
            "kv_slots": plan.block_tables[row, blocks] * size + positions - blocks * size,
            "sequences": row,
            "contexts": positions + 1,
            "scales": plan.adapter_scales[row].view(np.int32),
            "sample_tokens": ends[plan.sample_rows] - 1,
            "sample_slots": plan.slots[plan.sample_rows],
            "tiles": tiles,
            "block_tables": plan.block_tables,
        }
        for name, values in arrays.items():
            layout.host(buffer, name)[...] = values
        return layout.size
