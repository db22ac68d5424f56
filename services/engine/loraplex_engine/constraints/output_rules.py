"""What one output may go on with: its structure, its banned sequences, or both, as one mask and one end.

A token may be drawn if the structure allows it and it completes no banned sequence. Where the structure lets the output
end, it may end by each of the model's end-of-text ids and by each of the request's own stop ids. Tokens that an adapter adds are
no part of any structure; one that is among the request's stop ids ends it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from loraplex_engine.constraints.banned_sequences import BannedSequences
    from loraplex_engine.constraints.types import ConstraintState, MaskFiller

WORD_BITS: Final = 32
ALL: Final = -1
"""A word of a mask that allows all its tokens."""


class OutputRules:
    """The rules of one running output; one thread at a time uses them.

    Args:
        structure: What the output must look like; None: anything.
        bans: Sequences that it must not contain; None: none.
        eos_token_ids: The model's end-of-text ids.
        stop_token_ids: The request's own ids that end the output.
    """

    def __init__(
        self,
        structure: ConstraintState | None,
        bans: BannedSequences | None = None,
        *,
        eos_token_ids: tuple[int, ...] = (),
        stop_token_ids: tuple[int, ...] = (),
    ) -> None:
        self.structure = structure
        self._bans = bans
        self._eos = eos_token_ids
        self._ends = (*eos_token_ids, *stop_token_ids)
        self._added_ends: frozenset[int] = frozenset()
        self._end_token_id = -1

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Ids that end an output with a structure, end-of-text with ignore_eos too; empty if there is no structure."""
        return () if self.structure is None else self._ends

    @property
    def is_ended(self) -> bool:
        """Whether the structure is complete: only end-of-text can follow."""
        return self.structure is not None and self.structure.is_ended

    def accept(self, token_id: int) -> None:
        """Take in a drawn token.

        Raises:
            ConstraintError: If the structure does not allow it.
        """
        if self._bans is not None:
            self._bans.accept(token_id)
        if self.structure is not None:
            self.structure.accept(self._end_token_id if token_id in self._added_ends else token_id)

    def edit(self, mask: NDArray[np.int32]) -> None:
        """Make the structure's mask the output's: add all ways to end, and take banned tokens away.

        Args:
            mask: int32 ``[words]``; all bits set if there is no structure.
        """
        if self.structure is not None and len(self._ends) > 1:
            self._add_ends(mask)
        if self._bans is not None:
            for token_id in self._bans.banned_now():
                if token_id // WORD_BITS < len(mask):  # what is behind the mask cannot be drawn at all
                    mask[token_id // WORD_BITS] &= np.int32(~_bit(token_id))

    def _add_ends(self, mask: NDArray[np.int32]) -> None:
        self._added_ends = frozenset()
        for token_id in self._eos:
            if _has(mask, token_id):
                break
        else:
            return
        self._end_token_id = token_id
        ends = (each for each in self._ends if each // WORD_BITS < len(mask))
        self._added_ends = frozenset(each for each in ends if not _has(mask, each))
        for each in self._added_ends:
            mask[each // WORD_BITS] |= np.int32(_bit(each))


def fill_masks(rules: Sequence[OutputRules | None], out: NDArray[np.int32], filler: MaskFiller | None) -> None:
    """Write the masks of outputs.

    Args:
        rules: Rules of R outputs, each once; None allows every token.
        out: int32 ``[R, words]``, contiguous: at least the vocabulary's, and in steps with adapters that add tokens those.
        filler: Fills the masks of structures; None if no output can have one.
    """
    rows, states = [], []
    for row, each in enumerate(rules):
        if each is None or each.structure is None:
            out[row] = ALL
        else:
            rows.append(row)
            states.append(each.structure)
    if states:
        assert filler is not None, "an engine that compiles structures can fill their masks"
        if len(states) == len(rules):
            filler.fill(states, out)
        else:
            masks = np.empty((len(states), out.shape[1]), dtype=np.int32)
            filler.fill(states, masks)
            out[rows] = masks
    for row, each in enumerate(rules):
        if each is not None:
            each.edit(out[row])


def _has(mask: NDArray[np.int32], token_id: int) -> bool:
    return bool(mask.item(token_id // WORD_BITS) >> (token_id % WORD_BITS) & 1)


def _bit(token_id: int) -> int:
    """Return the token's bit in its word, as a signed integer of 32 bits."""
    bit = 1 << (token_id % WORD_BITS)
    return bit - (1 << WORD_BITS) if bit >> (WORD_BITS - 1) else bit
