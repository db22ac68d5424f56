"""Decides which blocks a request finds in the prefix cache, and which blocks it leaves there.

Only full blocks are shared, and only when the host knows their tokens and their step's result has come. The block that
is being filled is not shared, nor a speculative token's block, nor the blocks of a row whose logits were not finite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from loraplex_engine.pages.block_keys import BlockKeys
from loraplex_engine.pages.page_pool import NO_PAGES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_engine.limits import EngineLimits
    from loraplex_engine.pages.page_pool import Pages
    from loraplex_engine.pages.prefix_cache import PrefixCache
    from loraplex_engine.scheduler.decode_state import DecodeState
    from loraplex_engine.scheduler.request import Request


class PrefixSharing:
    """Connects requests and the prefix cache.

    Args:
        prefix: The cache.
        state: Rows of running requests.
        limits: Whether anything is shared, and the base model's numerics: part of each block's name.
    """

    def __init__(self, *, prefix: PrefixCache, state: DecodeState, limits: EngineLimits) -> None:
        self._prefix = prefix
        self._state = state
        self._is_enabled = limits.policy.enable_prefix_cache
        self._numerics = limits.numerics

    def find(self, request: Request) -> Pages:
        """Return the pages a waiting request can share; they are not held yet.

        The request's last known token is never in them: the first draw needs one token to be computed. A request that
        still owes its prompt's probabilities computes the whole prompt.
        """
        if not self._is_enabled or request.owes_prompt_logprobs:
            return NO_PAGES
        tokens = request.submission.prompt_token_ids
        if len(request.output_token_ids):
            tokens = np.concatenate([tokens, request.output_token_ids])
        most = (request.num_known_tokens - 1) // self._state.block_tokens
        return self._prefix.match(self._keys(request, tokens), most)

    def publish(self, request: Request) -> None:
        """Offer a running request's finished blocks to others."""
        self._finished_keys(request, and_publish=True)

    def leave(self, request: Request, now_s: float) -> None:
        """Offer what a running request has computed, and count one use of each block; its pages are freed next."""
        keys = self._finished_keys(request, and_publish=not request.is_suspect)
        self._prefix.leave(keys, now_s)

    def _finished_keys(self, request: Request, *, and_publish: bool) -> list[bytes]:
        if not self._is_enabled:
            return []
        slot = request.slot
        num_tokens = self._num_confirmed(request)
        num_blocks = num_tokens // self._state.block_tokens
        keys = self._keys(request, self._state.tokens[slot, :num_tokens])[:num_blocks]
        if and_publish:
            self._prefix.publish(keys, self._state.blocks[slot, :num_blocks].astype(np.intp))
        return keys

    def _num_confirmed(self, request: Request) -> int:
        """Return how many tokens have keys and values in the pool and are known to the host."""
        if request.num_confirmed < request.num_known_tokens:
            return request.num_confirmed
        return request.num_prompt_tokens + int(self._state.num_outputs[request.slot]) - 1

    def _keys(self, request: Request, tokens: NDArray[np.int32]) -> list[bytes]:
        if request.block_keys is None:
            submission = request.submission
            request.block_keys = BlockKeys(
                adapter_digest=submission.adapter_digest,
                adapter_scale=submission.adapter_scale,
                cache_salt=submission.cache_salt,
                block_tokens=self._state.block_tokens,
                numerics=self._numerics,
                adapter_start=submission.adapter_start,
                more_adapters=submission.more_adapters,
            )
        return request.block_keys.extend(tokens)
