"""Requests that can never fit, refused at once with the arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.errors import RequestTooLargeError

if TYPE_CHECKING:
    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.pages.page_pool import PagePool
    from loraplex_engine.scheduler.request import Request
    from loraplex_engine.scheduler.request_book import RequestBook


class SizeCheck:
    """Compares what a request needs alone with what the pool has.

    Args:
        book: Ends the requests that do not fit.
    """

    def __init__(self, *, pool: PagePool, cache: AdapterCache, book: RequestBook, block_tokens: int) -> None:
        self._pool = pool
        self._cache = cache
        self._book = book
        self._block_tokens = block_tokens

    def refuse_if_too_large(self, request: Request) -> bool:
        """End a request that cannot fit even alone; an open-ended one is cut to what fits instead."""
        digest = request.adapter_digest
        adapter_pages = (self._cache.states.num_pages_of(digest) or 0) if digest else 0
        pinned = self._cache.states.num_pinned_pages
        if digest is not None and self._cache.states.is_pinned(digest):
            pinned -= adapter_pages
        room = self._pool.num_pages - adapter_pages - pinned
        if request.submission.stopping.max_new_tokens is None:
            most = room * self._block_tokens + 1 - request.num_prompt_tokens
            request.max_outputs = min(request.max_outputs, max(most, len(request.output_token_ids) + 1))
        needed = -(-request.max_kv_tokens // self._block_tokens)
        if needed <= room:
            return False
        error = RequestTooLargeError(
            f"{request.num_prompt_tokens} prompt and {request.max_outputs} output tokens need {needed} pages of "
            f"{self._block_tokens} tokens, the adapter {adapter_pages} pages; the pool has {self._pool.num_pages}, "
            f"{pinned} of them pinned by other adapters",
            metadata={
                "kv_pages": str(needed),
                "adapter_pages": str(adapter_pages),
                "pool_pages": str(self._pool.num_pages),
            },
        )
        self._book.fail(request, error)
        return True
