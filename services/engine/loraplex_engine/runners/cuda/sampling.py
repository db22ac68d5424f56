"""Sampling on the device: one kernel draws what the torch `Sampler` draws, and never makes the host wait (ADR 11).

State that outlives a step is in device buffers by slot, written when a slot changes its occupant. How rows draw comes
with each plan and is sent with it. The kernel itself keeps penalty counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from loraplex_kernels.sampling.greedy import Greedy
from loraplex_kernels.sampling.sample import (
    EDIT_DTYPE,
    EDIT_INTS,
    EDIT_NOT_ALLOWED,
    EDIT_STOP,
    IN_PROMPT,
    MOST_COUNTED,
    ROW_DTYPE,
    ROW_INTS,
    Sample,
)

from loraplex_engine.runners.philox import upload
from loraplex_engine.sampling_params import MAX_BIASED_TOKENS, MAX_LOGPROBS, MAX_STOP_TOKENS

if TYPE_CHECKING:
    from loraplex_kernels.module import KernelLibrary
    from numpy.typing import NDArray
    from torch import Tensor

    from loraplex_engine.runners.sampled import Masks
    from loraplex_engine.step import SamplingArrays, SlotSetup

FIRST_ROWS: Final = 8
MODEL_STOP_TOKENS: Final = 64  # end-of-text ids of the model, beside the request's own
MAX_EDITS: Final = 2 * MAX_BIASED_TOKENS + MAX_STOP_TOKENS + MODEL_STOP_TOKENS


class SlotRows:
    """Rows of device buffers, given to the slots that need one; the buffers double when none is free.

    About one slot in a hundred needs a row, and penalty counts of 256 slots x 128k tokens take 64 MiB: so not each slot
    has one.

    Args:
        num_slots: Number of slots.
        columns: Buffer -> (columns, dtype).

    Attributes:
        of_slot: int32 ``[num_slots]``; -1 for a slot without a row.
        buffers: Name -> ``[rows, columns]``; empty until a slot needs a row.
    """

    def __init__(self, num_slots: int, device: torch.device, columns: dict[str, tuple[int, torch.dtype]]) -> None:
        self.of_slot = np.full(num_slots, -1, dtype=np.int32)
        self.buffers: dict[str, Tensor] = {}
        self._device, self._columns = device, columns
        self._free: list[int] = []
        self._num_rows = 0

    def put(self, slot: int, **values: NDArray[np.generic]) -> None:
        """Give a slot a row unless it has one, and write the first columns of its buffers."""
        if self.of_slot[slot] < 0:
            if not self._free:
                self._grow()
            self.of_slot[slot] = self._free.pop()
        for name, array in values.items():
            self.buffers[name][self.of_slot[slot], : len(array)].copy_(upload(array, self._device), non_blocking=True)

    def release(self, slot: int) -> None:
        """Take a slot's row back, if it has one."""
        if self.of_slot[slot] >= 0:
            self._free.append(int(self.of_slot[slot]))
            self.of_slot[slot] = -1

    def _grow(self) -> None:
        """Double the buffers; steps in flight read the old ones, whose memory only later work of the stream reuses."""
        num_rows = max(FIRST_ROWS, 2 * self._num_rows)
        for name, (columns, dtype) in self._columns.items():
            wider = torch.zeros((num_rows, columns), dtype=dtype, device=self._device)
            if self._num_rows:
                wider[: self._num_rows].copy_(self.buffers[name], non_blocking=True)
            self.buffers[name] = wider
        self._free += range(num_rows - 1, self._num_rows - 1, -1)
        self._num_rows = num_rows


def make_edits(setup: SlotSetup) -> NDArray[np.void]:
    """Return what a setup does to single logits, `EDIT_DTYPE`, tokens rising.

    With allowed ids, tokens without an edit cannot be drawn; tokens that are only biased or only stop are marked.
    """
    allowed, stops = set(setup.allowed_token_ids), set(setup.stop_token_ids)
    tokens = sorted({*allowed, *stops, *setup.logit_bias})
    edits = np.zeros(len(tokens), EDIT_DTYPE)
    for index, token in enumerate(tokens):
        is_forbidden = bool(allowed) and token not in allowed
        flags = EDIT_NOT_ALLOWED * is_forbidden | EDIT_STOP * (token in stops)
        edits[index] = (token, setup.logit_bias.get(token, 0.0), flags)
    return edits


def make_bitmap(tokens: NDArray[np.int32], num_bytes: int) -> NDArray[np.uint8]:
    """Return uint8 ``[num_bytes]`` with bit ``t % 8`` of byte ``t // 8`` set for each token."""
    bits = np.zeros(8 * num_bytes, dtype=np.uint8)
    bits[tokens] = 1
    return np.packbits(bits, bitorder="little")


def pack_counts(vocab_size: int, prompt: NDArray[np.int32], output: NDArray[np.int32]) -> NDArray[np.int16]:
    """Return int16 ``[vocab_size]``: `IN_PROMPT` for a prompt's tokens, plus how often each is in the output."""
    counts = np.bincount(output, minlength=vocab_size).clip(max=MOST_COUNTED).astype(np.uint16)
    counts[prompt] |= IN_PROMPT
    return counts.view(np.int16)


class DeviceSampler:
    """Draws tokens on the device.

    Args:
        library: Kernels; also says the device.
        vocab_size: Most tokens that logits can have columns for: how far their rows lie apart.
        num_slots: Number of slots.
        max_rows: Most rows of one step.
        kernel: The sampling kernel, compiled already; made here if unset.

    Attributes:
        kernel: The sampling kernel.
        greedy: That of rows that are all greedy and ask nothing else.
    """

    def __init__(
        self, library: KernelLibrary, *, vocab_size: int, num_slots: int, max_rows: int, kernel: Sample | None = None
    ) -> None:
        self._vocab_size, self._max_rows, self._device = vocab_size, max_rows, library.device
        self.kernel = kernel or Sample(library, vocab_size)
        self.greedy = Greedy(library, vocab_size)
        self._setups: dict[int, SlotSetup] = {}
        bitmap = (self.kernel.bitmap_bytes, torch.uint8)
        self._edits = SlotRows(
            num_slots, self._device, {"edits": (MAX_EDITS * EDIT_INTS, torch.int32), "bitmap": bitmap}
        )
        self._counts = SlotRows(num_slots, self._device, {"counts": (vocab_size, torch.int16)})
        self._num_edits = np.zeros(num_slots, dtype=np.int32)  # as in `ROW_DTYPE`
        self._only_stops = np.zeros(num_slots, dtype=np.bool_)
        self._make_report(MAX_LOGPROBS)

    def occupy(self, setup: SlotSetup) -> None:
        """Take over a slot's new occupant; penalty counts are rebuilt from its tokens."""
        self._forget(setup.slot)
        if not setup.is_special:
            return
        self._setups[setup.slot] = setup
        try:
            self._write(setup)
        except BaseException:
            self._forget(setup.slot)  # a setup that is half written must not act on draws
            raise

    def _write(self, setup: SlotSetup) -> None:
        edits = make_edits(setup)
        if len(edits):
            bitmap = make_bitmap(edits["token"], self.kernel.bitmap_bytes)
            self._edits.put(setup.slot, edits=edits.view(np.int32), bitmap=bitmap)
            self._num_edits[setup.slot] = -len(edits) if setup.allowed_token_ids else len(edits)
            self._only_stops[setup.slot] = not (setup.allowed_token_ids or setup.logit_bias)
        if setup.uses_penalties:
            counts = pack_counts(self._vocab_size, setup.prompt_token_ids, setup.output_token_ids)
            self._counts.put(setup.slot, counts=counts)

    def vacate(self, slots: NDArray[np.int32]) -> None:
        """Forget slots whose new occupant needs no state."""
        if self._setups:
            for slot in slots.tolist():
                self._forget(slot)

    def _forget(self, slot: int) -> None:
        if self._setups.pop(slot, None) is not None:
            self._edits.release(slot)
            self._counts.release(slot)

    def setup(self, slot: int) -> SlotSetup | None:
        """Return the facts of a slot's occupant that the plan's arrays do not carry; None if they carry all."""
        return self._setups.get(slot)

    def has_any(self, slots: NDArray[np.int32]) -> bool:
        """Tell whether the sampler keeps state for any of these slots."""
        return bool(self._setups) and any(slot in self._setups for slot in slots.tolist())

    def sample(
        self,
        logits: Tensor,
        slots: NDArray[np.int32],
        arrays: SamplingArrays,
        drawn: Tensor,
        last_sampled: Tensor,
        masks: Masks | None = None,
    ) -> Tensor | None:
        """Draw one token per row.

        Args:
            logits: ``[rows, tokens]`` in the library's dtype, rows ``vocab_size`` apart.
            slots: int32 ``[rows]``.
            arrays: How to draw.
            drawn: int32 ``[2, rows]``; gets tokens and outcomes as in `Sampled`.
            last_sampled: int32 ``[num_slots]`` or more; gets each slot's token.
            masks: What rows may draw at most; None if all may draw every token.

        Returns:
            int32 ``[rows, 1 + 2 n]``, overwritten by the next step: for rows that asked, fp32 bits of the log
            probabilities of the drawn token and of the likeliest tokens, then the ids of these. None if no row asked.
        """
        rows = self.pack_rows(slots, arrays, masks)
        most = min(int(arrays.num_logprobs.max(initial=-1)), logits.shape[1])
        if most > self._report_top:
            self._make_report(most)
        columns = 1 + 2 * min(self._report_top, logits.shape[1])
        report = None if most < 0 else self._report[: len(rows) * columns].view(len(rows), columns)
        self.kernel.launch(
            logits,
            upload(rows.view(np.int32).reshape(-1, ROW_INTS), self._device),
            drawn,
            last_sampled,
            **self.device_rows(),
            masks=None if masks is None else masks.words,
            report=report,
        )
        return report

    def device_rows(self) -> dict[str, Tensor | None]:
        """Return the state of slots in the form that `Sample.launch` takes."""
        edits = self._edits.buffers.get("edits")
        return {
            "edits": None if edits is None else edits.view(edits.shape[0], MAX_EDITS, EDIT_INTS),
            "edit_bits": self._edits.buffers.get("bitmap"),
            "counts": self._counts.buffers.get("counts"),
        }

    def pack_rows(
        self, slots: NDArray[np.int32], arrays: SamplingArrays, masks: Masks | None = None
    ) -> NDArray[np.void]:
        """Return `ROW_DTYPE` ``[rows]``."""
        rows = np.zeros(len(slots), ROW_DTYPE)
        rows["slot"], rows["mask_row"] = slots, -1
        if masks is not None:
            rows["mask_row"][masks.rows] = np.arange(len(masks.rows))
        rows["repetition"], rows["presence"] = arrays.repetition_penalty, arrays.presence_penalty
        rows["frequency"], rows["num_top"] = arrays.frequency_penalty, arrays.num_logprobs
        rows["is_banning"] = arrays.ban_stops
        for name in ("temperature", "top_k", "top_p", "min_p", "seed", "position"):
            rows[name] = getattr(arrays, name)
        is_inert = self._only_stops.take(slots) & ~arrays.ban_stops
        rows["edit_row"] = np.where(is_inert, -1, self._edits.of_slot.take(slots))
        rows["num_edits"] = self._num_edits.take(slots)
        rows["count_row"] = self._counts.of_slot.take(slots)
        return rows

    def _make_report(self, num_top: int) -> None:
        self._report_top = num_top
        self._report = torch.zeros(self._max_rows * (1 + 2 * num_top), dtype=torch.int32, device=self._device)
