"""Rows of tokens that adapters bring (`loraplex_common.token_rows`), as the host sees them; shared by all backends.

The ids of an adapter's rows are read from its image when it is loaded. They say which ids behind the base's vocabulary its
requests may have as input, and whether a step's logits have columns for added tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_common.adapter_image import layout
from loraplex_common.errors import AdapterIncompatibleError, InvalidParameterError
from loraplex_common.low_rank import LOW_RANK
from loraplex_common.projections import EMBED_OP, HEAD_OP
from loraplex_common.token_rows import KIND_IDS, ROWS, Rows
from numpy.typing import NDArray

from loraplex_engine.step import NO_ADAPTER

if TYPE_CHECKING:
    from loraplex_common.adapter_image import AdapterSpec, Geometry

    from loraplex_engine.runners.slot_faults import SlotFaults
    from loraplex_engine.step import StepPlan

OUTSIDE_KINDS: Final = (LOW_RANK, ROWS)
"""Kinds of parts that backends compute outside of the decoder layers."""
_NO_IDS: Final = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class RowIds:
    """Tokens of which an adapter has rows, int32, ascending."""

    digest: str
    embed: NDArray[np.int32]
    head: NDArray[np.int32]


class TokenRows:
    """The rows of tokens of the adapters that are bound; adapters without any take no part.

    Args:
        geometry: Geometry of images.
        vocab_size: The base's vocabulary.
        max_added_tokens: Tokens that an adapter may add behind it.

    Attributes:
        vocab_size: The base's vocabulary.
        num_tokens: The vocabulary and all tokens that an adapter may add: columns of the widest logits.
    """

    def __init__(self, geometry: Geometry, *, vocab_size: int, max_added_tokens: int) -> None:
        self._geometry = geometry
        self.vocab_size = vocab_size
        self.num_tokens = vocab_size + max_added_tokens
        self._ids: dict[int, RowIds] = {}
        self._adding: NDArray[np.int32] = _NO_IDS  # indices of adapters that add tokens

    def check(self, spec: AdapterSpec) -> None:
        """Refuse an adapter that no backend computes outside of the decoder layers.

        Raises:
            AdapterIncompatibleError: If it has another part than a pair or rows there, adds more tokens than may be, or rows of
                it would have to begin in the middle of a sequence.
        """
        for layer, projection, kind, _ in spec.sizes:
            if layer != self._geometry.outside:
                continue
            if kind not in OUTSIDE_KINDS:
                raise AdapterIncompatibleError(
                    f"adapter {spec.digest}: {projection}: parts of kind {kind!r} are not computed outside of the decoder layers, "
                    f"only {', '.join(OUTSIDE_KINDS)}: train {projection} with plain LoRA, or leave it out"
                )
            if spec.is_activated and kind == ROWS:
                raise AdapterIncompatibleError(
                    f"adapter {spec.digest}: {projection}: an activated adapter begins in the middle of a sequence, rows of tokens "
                    "hold for all of it: train it without modules_to_save and trainable_token_indices"
                )
        num_added = spec.last_row_id + 1 - self.vocab_size
        if num_added > self.num_tokens - self.vocab_size:
            raise AdapterIncompatibleError(
                f"adapter {spec.digest}: it adds tokens up to id {spec.last_row_id}, the last of {num_added} behind the base "
                f"model's vocabulary of {self.vocab_size}; this engine takes {self.num_tokens - self.vocab_size}: start it with "
                f"--max-added-tokens {num_added}"
            )

    def bind(self, index: int, spec: AdapterSpec, source: NDArray[np.uint8]) -> RowIds | None:
        """Take an adapter's rows from its image; None if it has none.

        Args:
            index: Index of the adapter table.
            spec: The adapter, `check`ed.
            source: The image, ``[num_pages, page_bytes]``.

        Raises:
            AdapterIncompatibleError: If the ids are not those of the spec, or it can draw a token that it has no embedding for.
        """
        if spec.last_row_id < 0:
            return None
        found = self._ids[index] = self._read(spec, source)
        if found.embed.size and found.embed[-1] >= self.vocab_size:
            self._adding = np.append(self._adding, np.int32(index))
        return found

    def unbind(self, index: int) -> None:
        """Forget an adapter, if it has rows."""
        if self._ids.pop(index, None) is not None:
            self._adding = self._adding[self._adding != index]

    def num_columns(self, plan: StepPlan) -> int:
        """Return how many tokens a step's logits have columns for: more than the vocabulary if an adapter in it adds tokens."""
        if self._adding.size and np.isin(plan.adapters, self._adding).any():
            return self.num_tokens
        return self.vocab_size

    def known_input(self, plan: StepPlan, faults: SlotFaults) -> StepPlan:
        """Return the plan, with ids that are not known to a row's adapter replaced by 0.

        Args:
            plan: The step.
            faults: Gets the slots of such rows.
        """
        if not plan.token_ids.size or plan.token_ids.max() < self.vocab_size:
            return plan
        token_ids, ends = plan.token_ids.copy(), np.cumsum(plan.num_tokens)
        at = np.flatnonzero(token_ids >= self.vocab_size)
        rows = np.searchsorted(ends, at, side="right")
        for row in np.unique(rows).tolist():
            mine, adapter = at[rows == row], int(plan.adapters[row])
            bound = self._ids.get(adapter) if adapter != NO_ADAPTER else None
            unknown = mine if bound is None else mine[~np.isin(token_ids[mine], bound.embed)]
            if unknown.size:
                faults[int(plan.slots[row])] = self._no_row(int(token_ids[unknown[0]]), bound)
                token_ids[unknown] = 0
        return replace(plan, token_ids=token_ids)

    def _no_row(self, token_id: int, bound: RowIds | None) -> InvalidParameterError:
        has = (
            "its adapter has no rows of tokens" if bound is None else f"adapter {bound.digest} has no embedding for it"
        )
        return InvalidParameterError(
            f"prompt_token_ids: token id {token_id} is behind the base model's vocabulary of {self.vocab_size}, and {has}",
            field="prompt_token_ids",
        )

    def _read(self, spec: AdapterSpec, source: NDArray[np.uint8]) -> RowIds:
        ids = {EMBED_OP: _NO_IDS, HEAD_OP: _NO_IDS}
        tiles = layout(self._geometry, spec.sizes).tiles
        for _, op, _, _, _, _, cols, page, offset in tiles[tiles["kind"] == KIND_IDS].tolist():
            name, values = self._geometry.ops[op].name, source[page][offset : offset + 4 * cols].view(np.int32)
            ids[name] = np.concatenate([ids[name], values])
        for module in spec.modules:
            for part in module.parts:
                if isinstance(part, Rows):
                    self._check_ids(spec, module.projection, part, ids)
        embed, head = ids[EMBED_OP], ids[HEAD_OP]
        silent = head[(head >= self.vocab_size) & ~np.isin(head, embed)]
        if silent.size:
            raise AdapterIncompatibleError(
                f"adapter {spec.digest}: it can draw the added token {silent[0]}, and has no embedding for it: save it with the rows "
                "of its embedding"
            )
        return RowIds(spec.digest, embed, head)

    def _check_ids(self, spec: AdapterSpec, projection: str, part: Rows, ids: dict[str, NDArray[np.int32]]) -> None:
        op, _ = self._geometry.place(self._geometry.num_decoder_layers, projection)
        mine = ids[self._geometry.ops[op].name]
        is_rising = mine[0] >= 0 and bool((np.diff(mine) > 0).all())
        if len(mine) != part.num_rows or not is_rising or mine[-1] != part.last_id:
            raise AdapterIncompatibleError(
                f"adapter {spec.digest}: {projection}: the ids of its rows are not {part.num_rows} rising ids up to {part.last_id}: "
                "import it again"
            )
