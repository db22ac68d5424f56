"""What adapters do outside of the decoder layers, in the CUDA backend: to the embedding before the layers, to the logits behind.

The kernels run around a step, not in it: the embedding's rows are written ahead of the step's own lookup, which then leaves them
alone, and logits are edited once they are there. So no graph knows of them, graphs of any variant serve steps with them, and
steps without them launch nothing. What they cost a step that has drawn greedily in its graph is a second draw.

Legend: N = rows (sequences) of the step, T = its tokens, S = sampling rows, V = the base's vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from loraplex_common.projections import EMBED_OP, HEAD_OP

from loraplex_engine.runners.cuda.outside_kernels import OutsideEmbedding, OutsideHead
from loraplex_engine.runners.prompt_logprobs import CHUNK_POSITIONS
from loraplex_engine.step import NO_ADAPTER

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_kernels.lora.tables import AdapterTables
    from loraplex_kernels.module import KernelLibrary
    from numpy.typing import NDArray
    from torch import Tensor

    from loraplex_engine.runners.cuda.outside_kernels import OutsideDecoder
    from loraplex_engine.runners.cuda.step_input import StepInputs
    from loraplex_engine.runners.cuda.workspace import LargestStep
    from loraplex_engine.runners.prompt_logprobs import LogitsOf
    from loraplex_engine.step import StepPlan

Terms = list[tuple["NDArray[np.int32]", "NDArray[np.float32]"]]
"""Adapter of each row, -1 for none, and the requests' factors on it: one entry for the first adapters of rows, and one for each
place in the lists of rows with several."""


def terms_of(plan: StepPlan) -> Terms:
    """Return the adapters of a step's rows."""
    terms, more = [(plan.adapters, plan.adapter_scales)], plan.more_adapters
    places = np.arange(len(more.rows)) - np.searchsorted(more.rows, more.rows)
    for place in range(int(places.max(initial=-1)) + 1):
        mine = places == place
        adapters, scales = np.full_like(plan.adapters, NO_ADAPTER), np.ones_like(plan.adapter_scales)
        adapters[more.rows[mine]], scales[more.rows[mine]] = more.adapters[mine], more.scales[mine]
        terms.append((adapters, scales))
    return terms


class OutsideModules:
    """Embedding and lm_head of adapters.

    Args:
        library: Kernels.
        tables: The resident adapters.
        pool: uint8 ``[pages, page_bytes]``.
        decoder: Whose steps they are.
        largest: Largest step.
        num_sms: Multiprocessors of the device.
    """

    def __init__(
        self,
        library: KernelLibrary,
        tables: AdapterTables,
        pool: Tensor,
        decoder: OutsideDecoder,
        largest: LargestStep,
        *,
        num_sms: int,
    ) -> None:
        self._has_any, self._decoder = tables.outside.has_any, decoder
        ops = tables.outside.ops
        self._embedding = OutsideEmbedding(library, ops[EMBED_OP], pool, decoder, largest)
        max_rows = max(largest.max_rows, CHUNK_POSITIONS)
        self._head = OutsideHead(library, ops[HEAD_OP], pool, decoder, max_rows=max_rows, num_sms=num_sms)
        self._num_binds = 0

    @property
    def fixed_tensors(self) -> tuple[Tensor, ...]:
        """Tensors whose addresses reach kernels through tables."""
        return (*self._embedding.fixed_tensors, *self._head.fixed_tensors)

    def forget(self) -> None:
        """Take note that an index of the tables names another adapter."""
        self._num_binds += 1

    def have(self, plan: StepPlan) -> bool:
        """Tell whether a row of the step has an adapter of the embedding or of lm_head."""
        more = plan.more_adapters.adapters
        return bool(self._has_any[plan.adapters].any() or (len(more) and self._has_any[more].any()))

    def embed(self, plan: StepPlan, step: StepInputs) -> None:
        """Write the embeddings that adapters adapt, before the step's layers.

        Args:
            plan: The step.
            step: Its inputs; ids of tokens whose embedding is written change, `plain_ids` reads them.
        """
        for adapters, scales in terms_of(plan):
            of_token, factors = np.repeat(adapters, plan.num_tokens), np.repeat(scales, plan.num_tokens)
            self._embedding.write(of_token, factors, step, self._num_binds)

    def edit(self, plan: StepPlan, num_columns: int) -> Tensor:
        """Make lm_head's output for the sampling rows their adapters'; returns ``[S, num_columns]``, which the decoder finishes.

        Args:
            plan: The step; its logits are where lm_head has put them.
            num_columns: V, or more: the others are -inf but for tokens that a row's adapter adds.
        """
        rows, work = plan.sample_rows, self._decoder.work
        count = len(rows)
        terms = [(adapters[rows], scales[rows]) for adapters, scales in terms_of(plan)]
        self._edit(terms, work.x[:count], work.logits[:count], num_columns)
        return work.logits[:count, :num_columns]

    def logits_of(self, plan: StepPlan, num_columns: int) -> Callable[[int], LogitsOf]:
        """Return what tells how the logits of a row of the step are computed; see `PromptLogprobTracker.update`."""
        terms = terms_of(plan)

        def of_row(row: int) -> LogitsOf:
            mine = [(adapters[row : row + 1], scales[row : row + 1]) for adapters, scales in terms]
            is_plain = not any(self._head.adapts(adapters).any() for adapters, _ in mine)
            if is_plain and num_columns == self._decoder.vocab_size:
                return self._decoder.base_logits
            return lambda hidden: self._logits(hidden, mine, num_columns)

        return of_row

    def _logits(self, hidden: Tensor, terms: Terms, num_columns: int) -> Tensor:
        """Return logits of hidden states ``[n, hidden]`` that all belong to one row, whose adapters ``terms`` has."""
        x, base = self._decoder.head(hidden)
        logits = base.new_empty(len(base), self._decoder.work.logits.shape[1])
        logits[:, : base.shape[1]] = base
        each = [(adapters.repeat(len(base)), scales.repeat(len(base))) for adapters, scales in terms]
        self._edit(each, x, logits, num_columns)
        return self._decoder.finish_logits(logits[:, :num_columns])

    def _edit(self, terms: Terms, x: Tensor, logits: Tensor, num_columns: int) -> None:
        vocab = self._decoder.vocab_size
        if num_columns > vocab:
            logits[:, vocab:num_columns].fill_(float("-inf"))
        for adapters, scales in terms:
            self._head.apply(adapters, scales, x, logits, num_columns, self._num_binds)


def plain_ids(token_ids: Tensor) -> Tensor:
    """Return a step's input as int64, after `OutsideModules.embed` too; sampled tokens are still -1 where nothing adapts them."""
    ids = token_ids.long()
    return torch.where(ids < -1, -2 - ids, ids)
