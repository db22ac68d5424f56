"""Sampling: one token per row, with constraints, penalties, truncation and reported probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from loraplex_kernels.params import SampleParams

if TYPE_CHECKING:
    from loraplex_kernels.module import KernelLibrary

BLOCK: Final = 320
LIST_CAPACITY: Final = 2048
MAX_VOCAB: Final = 1 << 20  # ids have 20 bits in a key
UNIT: Final = 8  # tokens per byte of the edits' bitmap
WORD: Final = 32  # tokens per word of a mask
NOT_FINITE: Final = 0
VALID: Final = 1
NOTHING_LEFT: Final = 2
EDIT_NOT_ALLOWED: Final = 1
EDIT_STOP: Final = 2
IN_PROMPT: Final = 0x8000
MOST_COUNTED: Final = 0x7FFF

ROW_DTYPE: Final = np.dtype(
    [
        ("slot", np.int32),
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("seed", np.uint64),
        ("position", np.int32),
        ("num_top", np.int32),
        ("is_banning", np.int32),
        ("edit_row", np.int32),
        ("num_edits", np.int32),
        ("count_row", np.int32),
        ("mask_row", np.int32),
        ("reserved", np.int32, 3),
    ]
)
"""How a row draws, csrc/sampling/row.cuh. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep all; ``num_top`` -1
reports nothing, else the drawn token's log probability and so many likeliest; ``edit_row`` and ``count_row`` -1: none;
``num_edits`` below 0: tokens without an edit cannot be drawn; ``mask_row`` -1: no mask."""
EDIT_DTYPE: Final = np.dtype([("token", np.int32), ("bias", np.float32), ("flags", np.uint32)])
"""Edit of one token's logit: -inf if the token is not allowed, then the bias, then -inf if it is a banned stop."""
ROW_INTS: Final = ROW_DTYPE.itemsize // 4
EDIT_INTS: Final = EDIT_DTYPE.itemsize // 4


class Sample:
    """``token = argmax over kept tokens of value + noise`` per row; see csrc/sampling/sample.cu.

    Args:
        library: Compiles and loads the kernel.
        vocab_size: Most tokens, at most `MAX_VOCAB`: how far rows of logits and counts lie apart.
        block: Threads of a CTA.
        list_capacity: Candidates that shared memory holds, a power of two; more candidates are found by passes over the
            row.

    Raises:
        ValueError: If the vocabulary is too large.
    """

    def __init__(
        self,
        library: KernelLibrary,
        vocab_size: int,
        *,
        block: int = BLOCK,
        list_capacity: int = LIST_CAPACITY,
    ) -> None:
        if not 0 < vocab_size <= MAX_VOCAB:
            raise ValueError(f"a vocabulary of {vocab_size} tokens is not in [1, {MAX_VOCAB}]")
        self._library, self._vocab, self._capacity = library, vocab_size, list_capacity
        defines = (f"THREADS={block}", f"CAPACITY={list_capacity}")
        self._kernel = library.load("sample", SampleParams(stride=vocab_size), block, defines=defines)

    @property
    def bitmap_bytes(self) -> int:
        """Bytes of one row of ``edit_bits``."""
        return -(-self._vocab // UNIT)

    @property
    def mask_words(self) -> int:
        """Words of one row of ``masks`` for as many tokens as there may be."""
        return -(-self._vocab // WORD)

    def launch(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        drawn: torch.Tensor,
        last_sampled: torch.Tensor,
        *,
        edits: torch.Tensor | None = None,
        edit_bits: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        report: torch.Tensor | None = None,
    ) -> None:
        """Draw one token per row; the host does not wait for the device.

        Args:
            logits: ``[rows, tokens]``, rows ``vocab_size`` apart; tokens behind the last column are not drawn.
            rows: int32 ``[rows, ROW_INTS]``, of `ROW_DTYPE`; each row and slot in it must exist in the other arguments.
            drawn: int32 ``[2, rows]``; tokens, and `VALID`; `NOTHING_LEFT` where no token can be drawn, `NOT_FINITE`
                where the row's largest logit is NaN or infinite.
            last_sampled: int32 ``[slots]``; gets each row's token too.
            edits: int32 ``[edit rows, most edits, EDIT_INTS]``, of `EDIT_DTYPE`, tokens rising; None if no row has any.
            edit_bits: uint8 ``[edit rows, bitmap_bytes]``; bit ``t % 8`` of byte ``t // 8`` is set for a token with an edit.
            counts: int16 ``[count rows, vocab]``; bit 15: the token is in the prompt; other bits: its count in the
                output, at most `MOST_COUNTED`. The drawn token is counted. None if no row has penalties.
            masks: int32 ``[mask rows, ceil(tokens / 32)]``; bit ``t % 32`` of word ``t // 32`` is set if token t may be drawn. None
                if no row has a mask.
            report: int32 ``[rows, 1 + 2 n]``; fp32 bits of the log probabilities of the drawn token and the n likeliest
                tokens, then the ids of these; written for rows that ask, as far as they ask. None if no row asks.

        Raises:
            ValueError: If a shape, dtype or device differs, or more likeliest tokens may be asked for than fit the
                report.
        """
        check, params, count, vocab = self._library.check, self._kernel.params, drawn.shape[1], self._vocab
        params.logits = check("logits", whole_rows(logits, vocab), self._library.dtype, count, vocab)
        params.vocab = tokens = logits.shape[1]
        params.rows = check("rows", rows, torch.int32, count, ROW_INTS)
        params.drawn = check("drawn", drawn, torch.int32, 2, count)
        params.last_sampled = check("last_sampled", last_sampled, torch.int32, -1)
        params.edits = params.edit_bits = params.counts = None
        params.max_edits = 0
        if edits is not None and edit_bits is not None:
            params.edits = check("edits", edits, torch.int32, -1, -1, EDIT_INTS)
            params.edit_bits = check("edit_bits", edit_bits, torch.uint8, edits.shape[0], self.bitmap_bytes)
            params.max_edits = edits.shape[1]
        if counts is not None:
            params.counts = check("counts", counts, torch.int16, -1, vocab)
        params.masks = None if masks is None else check("masks", masks, torch.int32, -1, -(-tokens // WORD))
        params.report, params.report_top = None, 0
        if report is not None:
            params.report = check("report", report, torch.int32, count, -1)
            params.report_top = (report.shape[1] - 1) // 2
            if params.report_top > self._capacity:
                raise ValueError(f"{params.report_top} likeliest tokens exceed the list of {self._capacity}")
        self._kernel.launch(count)


def whole_rows(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return rows that lie ``vocab_size`` apart with all their columns, those that are not drawn included."""
    rows, tokens = logits.shape
    if tokens >= vocab_size or (rows > 1 and logits.stride(0) != vocab_size):
        return logits  # as it has to be, or refused
    return logits.as_strided((rows, vocab_size), (vocab_size, 1))
