"""The kernels of what adapters do to the embedding, and of the rows of lm_head that they replace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from loraplex_common.token_rows import ROWS

from loraplex_kernels.lora.items import GROUP_INTS
from loraplex_kernels.row_params import EmbedRowsParams, HeadRowsParams

if TYPE_CHECKING:
    from loraplex_kernels.lora.outside_tables import OutsideOp
    from loraplex_kernels.module import KernelLibrary
    from loraplex_kernels.params import LoraTables

EMBED_BLOCK: Final = 128
HEAD_BLOCK: Final = 256
CTA_ROWS: Final = 32
"""Rows of lm_head that a CTA multiplies at a time."""
CTAS_PER_SM: Final = 2


def _fill(lora: LoraTables, tables: OutsideOp, pool: torch.Tensor) -> None:
    lora.pool, lora.tiles, lora.entry_stride = pool.data_ptr(), tables.tiles.data_ptr(), tables.entry_stride


class EmbedRows:
    """Rows of the embedding as adapters have them, and the columns of A that `LoraDecode.expand_add` multiplies.

    Args:
        library: Compiles and loads the kernel.
        tables: The embedding's entries.
        pool: uint8 ``[num_pages, page_bytes]``; the unified pool.
        hidden_size: Columns of the embedding.
    """

    def __init__(self, library: KernelLibrary, tables: OutsideOp, pool: torch.Tensor, hidden_size: int) -> None:
        self._library, self._tables, self._hidden = library, tables, hidden_size
        self._kept = (pool,)  # kept alive: the kernel has its address
        self._kernel = library.load("embed_rows", EmbedRowsParams(), EMBED_BLOCK, defines=(f"HIDDEN={hidden_size}",))
        _fill(self._kernel.params.lora, tables, pool)

    def launch(
        self,
        tokens: torch.Tensor,
        adapters: torch.Tensor,
        ids: torch.Tensor,
        slots: torch.Tensor,
        last_sampled: torch.Tensor,
        table: torch.Tensor,
        out: torch.Tensor,
        h: torch.Tensor,
    ) -> None:
        """Write rows of some tokens ahead of `Embedding.launch`, which then leaves these alone.

        Args:
            tokens: int32 ``[count]``; numbers in the step, each once.
            adapters: int32 ``[count]``; their adapters.
            ids: int32 ``[tokens of the step]``; -1: the token last sampled for the slot. Tokens whose row is written get -2 - id;
                one that has such an id already, from an earlier launch of the step, keeps its row and gets its h alone.
            slots: int32 ``[tokens of the step]``.
            last_sampled: int32 ``[slots]``.
            table: ``[vocab, hidden]``; the base's embedding.
            out: ``[tokens of the step, hidden]``.
            h: fp32 ``[planes, tokens, stacked rank]``; its first plane gets A's column of each token with a pair.

        Raises:
            ValueError: If a shape, dtype or device differs.
        """
        check, params, count = self._library.check, self._kernel.params, len(tokens)
        params.lora.entries = self._tables.entry_address(0, 0)
        params.rows = self._tables.entry_address(0, 0, ROWS)
        params.tokens = check("tokens", tokens, torch.int32, count)
        params.adapters = check("adapters", adapters, torch.int32, count)
        params.ids = check("ids", ids, torch.int32, out.shape[0])
        params.slots = check("slots", slots, torch.int32, out.shape[0])
        params.last_sampled = check("last_sampled", last_sampled, torch.int32, -1)
        params.table = check("table", table, self._library.dtype, -1, self._hidden)
        params.out = check("out", out, self._library.dtype, -1, self._hidden)
        params.h, params.h_stride = check("h", h, torch.float32, -1, -1, -1), h.stride(1)
        params.vocab = table.shape[0]
        self._kernel.launch(count)


class HeadRows:
    """Logits of the rows of lm_head that adapters replace.

    Args:
        library: Compiles and loads the kernel.
        tables: lm_head's entries.
        pool: uint8 ``[num_pages, page_bytes]``; the unified pool.
        hidden_size: Columns of lm_head.
        num_sms: Multiprocessors of the device.
    """

    def __init__(
        self, library: KernelLibrary, tables: OutsideOp, pool: torch.Tensor, hidden_size: int, *, num_sms: int
    ) -> None:
        self._library, self._tables, self._hidden = library, tables, hidden_size
        self._most_shares = CTAS_PER_SM * num_sms
        self._kept = (pool,)  # kept alive: the kernel has its address
        self._kernel = library.load("head_rows", HeadRowsParams(), HEAD_BLOCK)
        _fill(self._kernel.params.lora, tables, pool)

    def launch(self, groups: torch.Tensor, most_rows: int, x: torch.Tensor, logits: torch.Tensor, width: int) -> None:
        """Put the logits of replaced rows in the place of the base's.

        Args:
            groups: int32 ``[groups, GROUP_INTS]`` from `make_groups`; every adapter has rows.
            most_rows: Rows of the adapter with most.
            x: ``[tokens, hidden]``.
            logits: ``[tokens, columns]``, updated in place.
            width: Tokens that a row of logits has, at most ``columns``; rows of other tokens are left out.

        Raises:
            ValueError: If a shape, dtype or device differs.
        """
        check, params = self._library.check, self._kernel.params
        params.lora.entries = self._tables.entry_address(0, 0, ROWS)
        params.lora.groups = check("groups", groups, torch.int32, -1, GROUP_INTS)
        params.x = check("x", x, self._library.dtype, -1, self._hidden)
        params.logits = check("logits", logits, self._library.dtype, x.shape[0], -1)
        params.stride, params.columns, params.width = logits.shape[1], self._hidden, min(width, logits.shape[1])
        self._kernel.launch(max(1, min(-(-most_rows // CTA_ROWS), self._most_shares)), len(groups))
