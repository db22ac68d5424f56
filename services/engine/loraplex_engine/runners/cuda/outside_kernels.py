"""The kernels of adapters of the embedding and of lm_head with the rows of one step; see `outside`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from loraplex_common.projections import EMBED_OP, HEAD_OP
from loraplex_kernels.lora.decode import LoraDecode
from loraplex_kernels.lora.items import (
    GROUP_TOKENS,
    SHRINK_CHUNK,
    SHRINK_ROWS,
    SMALLEST_RUN,
    OpShape,
    make_groups,
)
from loraplex_kernels.lora.outside_tables import OUTSIDE_MAX_RANK
from loraplex_kernels.lora.token_rows import EmbedRows, HeadRows
from torch import Tensor

from loraplex_engine.runners.cuda.lora_grids import EXPAND_CTAS_PER_SM, SHRINK_CTAS_PER_SM
from loraplex_engine.runners.philox import upload

if TYPE_CHECKING:
    from loraplex_kernels.lora.outside_tables import OutsideOp
    from loraplex_kernels.module import KernelLibrary
    from numpy.typing import NDArray

    from loraplex_engine.runners.cuda.step_input import StepInputs
    from loraplex_engine.runners.cuda.workspace import LargestStep, Workspace

LAYER: Final = 0  # the tables of one op outside of the layers have no others


class OutsideDecoder(Protocol):
    """A decoder, as far as what surrounds its layers needs it."""

    work: Workspace
    last_sampled: Tensor

    @property
    def embedding(self) -> Tensor:
        """The base's embedding, ``[vocab, hidden]``."""
        ...

    @property
    def vocab_size(self) -> int:
        """Tokens of the base."""
        ...

    def head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return lm_head's input and output for hidden states."""
        ...

    def base_logits(self, hidden: Tensor) -> Tensor:
        """Return the base's logits of hidden states."""
        ...

    def finish_logits(self, logits: Tensor) -> Tensor:
        """Return the model's logits for lm_head's output with what adapters add."""
        ...


def max_items(shape: OpShape, num_groups: int) -> int:
    """Return an upper bound of the items of one op with that many groups, whatever the ranks."""
    shrink = -(-OUTSIDE_MAX_RANK // SHRINK_ROWS) * shape.num_planes
    return num_groups * (shrink + sum(-(-outputs // SMALLEST_RUN) for outputs in shape.outputs))


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens whose embedding is adapted.

    Attributes:
        tokens: int32 ``[count]``; numbers in the step.
        adapters: int32 ``[count]``.
        scales: fp32 ``[T]``.
        num_items: Items of the pairs.
    """

    tokens: Tensor
    adapters: Tensor
    scales: Tensor
    num_items: int


class OutsideEmbedding:
    """Embeddings as adapters have them.

    Args:
        library: Kernels.
        tables: The embedding's entries.
        pool: uint8 ``[pages, page_bytes]``.
        decoder: Whose steps they are.
        largest: Largest step.
    """

    def __init__(
        self, library: KernelLibrary, tables: OutsideOp, pool: Tensor, decoder: OutsideDecoder, largest: LargestStep
    ) -> None:
        self._tables, self._decoder, self._device = tables, decoder, library.device
        hidden = decoder.embedding.shape[1]
        self._rows = EmbedRows(library, tables, pool, hidden)
        shape = OpShape(columns=SHRINK_CHUNK, outputs=(hidden,))  # of one plane; nothing is shrunk: A's column is h
        groups = largest.max_tokens // GROUP_TOKENS + largest.max_rows
        self._lora = LoraDecode(
            library, tables, pool, (shape,), max_rows=largest.max_tokens, max_items=max_items(shape, groups)
        )
        self._h = self._lora.new_scratch()
        self._prepared: tuple[object, Tokens | None] = None, None

    @property
    def fixed_tensors(self) -> tuple[Tensor, ...]:
        """Tensors whose addresses reach kernels through tables."""
        return (self._lora.items.buffer, self._h)

    def write(self, adapters: NDArray[np.int32], scales: NDArray[np.float32], step: StepInputs, num_binds: int) -> None:
        """Write the embeddings of a step's tokens that adapters adapt; a second call adds what further adapters add.

        Args:
            adapters: int32 ``[tokens]``; -1 for none.
            scales: fp32 ``[tokens]``.
            step: The step's inputs, padding included.
            num_binds: Rises whenever an index of the tables names another adapter.
        """
        tokens = self._prepare(adapters, scales, (num_binds, adapters.tobytes(), scales.tobytes()))
        if tokens is None:
            return
        decoder, hidden = self._decoder, self._decoder.work.hidden[: len(step.token_ids)]
        self._rows.launch(
            tokens.tokens,
            tokens.adapters,
            step.token_ids,
            step.slots,
            decoder.last_sampled,
            decoder.embedding,
            hidden,
            self._h,
        )
        if tokens.num_items:
            self._lora.expand_add(LAYER, EMBED_OP, self._h, tokens.scales, hidden, tokens.num_items)

    def _prepare(self, adapters: NDArray[np.int32], scales: NDArray[np.float32], key: object) -> Tokens | None:
        if self._prepared[0] == key:
            return self._prepared[1]
        chosen = np.flatnonzero((adapters >= 0) & self._tables.has_parts()[adapters]).astype(np.int32)
        found = None
        if chosen.size:
            own = adapters[chosen]
            pairs = chosen[self._tables.max_stacked[own, 0] > 0]
            num_items = int(self._lora.prepare(adapters[pairs], pairs).counts[1]) if pairs.size else 0
            tokens, owners, factors = (upload(values, self._device) for values in (chosen, own, scales))
            found = Tokens(tokens, owners, factors, num_items)
        self._prepared = key, found
        return found


@dataclass(frozen=True, slots=True)
class HeadWork:
    """What a step's sampling rows need of lm_head's kernels.

    Attributes:
        scales: fp32 ``[S]``.
        grids: CTAs of the pairs' kernels; zeros without pairs.
        groups: Groups of rows whose adapter replaces rows of lm_head; None if none does.
        most_rows: Rows of the adapter with most.
    """

    scales: Tensor
    grids: tuple[int, int]
    groups: Tensor | None
    most_rows: int


class OutsideHead:
    """Logits as adapters have them.

    Args:
        library: Kernels.
        tables: lm_head's entries.
        pool: uint8 ``[pages, page_bytes]``.
        decoder: Whose steps they are.
        max_rows: Most rows of logits.
        num_sms: Multiprocessors of the device.
    """

    def __init__(
        self,
        library: KernelLibrary,
        tables: OutsideOp,
        pool: Tensor,
        decoder: OutsideDecoder,
        *,
        max_rows: int,
        num_sms: int,
    ) -> None:
        self._tables, self._device, self._num_sms = tables, library.device, num_sms
        hidden = decoder.embedding.shape[1]
        shape = OpShape(columns=hidden, outputs=(decoder.vocab_size,), row_columns=decoder.work.logits.shape[1])
        items = max_items(shape, max_rows)
        self._lora = LoraDecode(library, tables, pool, (shape,), max_rows=max_rows, max_items=items)
        self._h = self._lora.new_scratch()
        self._rows = HeadRows(library, tables, pool, hidden, num_sms=num_sms)
        self._prepared: tuple[object, HeadWork | None] = None, None

    @property
    def fixed_tensors(self) -> tuple[Tensor, ...]:
        """Tensors whose addresses reach kernels through tables."""
        return (self._lora.items.buffer, self._h)

    def adapts(self, adapters: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Tell which rows have an adapter of lm_head."""
        found: NDArray[np.bool_] = (adapters >= 0) & self._tables.has_parts()[adapters]
        return found

    def apply(
        self,
        adapters: NDArray[np.int32],
        scales: NDArray[np.float32],
        x: Tensor,
        logits: Tensor,
        width: int,
        num_binds: int,
    ) -> None:
        """Edit logits, in place: pairs are added, then rows that adapters have themselves take the place of what is there.

        Args:
            adapters: int32 ``[S]``; -1 for none.
            scales: fp32 ``[S]``.
            x: ``[S, hidden]``; lm_head's input.
            logits: ``[S, columns]``.
            width: Tokens that a row has, at most its columns.
            num_binds: Rises whenever an index of the tables names another adapter.
        """
        work = self._prepare(adapters, scales, (num_binds, adapters.tobytes(), scales.tobytes()))
        if work is None:
            return
        if work.grids[1]:
            self._lora.shrink(LAYER, HEAD_OP, x, self._h, work.grids[0])
            self._lora.expand_add(LAYER, HEAD_OP, self._h, work.scales, logits, work.grids[1])
        if work.groups is not None:
            self._rows.launch(work.groups, work.most_rows, x, logits, width)

    def _prepare(self, adapters: NDArray[np.int32], scales: NDArray[np.float32], key: object) -> HeadWork | None:
        if self._prepared[0] == key:
            return self._prepared[1]
        found, chosen = None, np.flatnonzero(self.adapts(adapters)).astype(np.int32)
        if chosen.size:
            own, grids, groups = adapters[chosen], (0, 0), None
            pairs, rows = chosen[self._tables.max_stacked[own, 0] > 0], chosen[self._tables.num_rows[own] > 0]
            if pairs.size:
                shrink, expand = self._lora.prepare(adapters[pairs], pairs).counts.tolist()
                grids = (
                    min(shrink, SHRINK_CTAS_PER_SM * self._num_sms),
                    min(expand, EXPAND_CTAS_PER_SM * self._num_sms),
                )
            if rows.size:
                groups = upload(make_groups(adapters[rows], rows), self._device)
            most = int(self._tables.num_rows[own].max())
            found = HeadWork(upload(scales, self._device), grids, groups, most)
        self._prepared = key, found
        return found
