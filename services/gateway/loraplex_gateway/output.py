"""From an engine's tokens to the chunks a client sees: text, stop strings, log-probabilities, positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_gateway import engine_wire
from loraplex_gateway.detokenizer import make_detokenizer
from loraplex_gateway.stops import StopMatcher
from loraplex_gateway.types import Chunk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex.v1 import gateway_pb2

    from loraplex_gateway.detokenizer import TokenTable
    from loraplex_gateway.types import PositionLogprobs, ResponseOptions, Stopping


class OutputAssembler:
    """The output of one request.

    Args:
        table: The model's tokens.
        options: What the chunks carry.
        stopping: Stop strings, and whether what stopped stays in the text.
        stop_token_ids: Ids that end the output; the text of the one that did is left out unless `include_stop`.

    Attributes:
        num_tokens: Output tokens so far, up to the one that completed a stop string.
        matched_stop: The stop string that ended the output, if one did.
    """

    def __init__(
        self, table: TokenTable, *, options: ResponseOptions, stopping: Stopping, stop_token_ids: frozenset[int]
    ) -> None:
        self.num_tokens = 0
        self.matched_stop: str | None = None
        self._table = table
        self._options = options
        self._include_stop = stopping.include_stop
        self._min_new_tokens = stopping.min_new_tokens or 0
        self._stop_token_ids = stop_token_ids
        self._needs_text = options.text or bool(stopping.stop_strings)
        self._detokenizer = make_detokenizer(table, skip_special_tokens=options.skip_special_tokens)
        self._stops = StopMatcher(stopping.stop_strings, include_stop=stopping.include_stop)
        # A stop token whose text is held until it is known whether the output really ends here: with min_new_tokens
        # only the engine can tell.
        self._held_token: int | None = None
        self._next_chunk = 0

    def push(self, token_ids: Sequence[int], logprobs: Sequence[gateway_pb2.PositionLogprobs]) -> Chunk | None:
        """Add tokens; return a chunk if there is anything to send. Tokens behind a stop string are dropped."""
        index = self.num_tokens
        text = ""
        num_taken = len(token_ids)
        if self._needs_text:
            pieces = []
            for position, token_id in enumerate(token_ids):
                is_stoppable = index + position >= self._min_new_tokens
                pieces.append(self._push_token(token_id, is_stoppable=is_stoppable))
                if self.matched_stop is not None:
                    num_taken = position + 1
                    break
            text = "".join(pieces)
        self.num_tokens += num_taken
        return self._chunk(index, token_ids[:num_taken], text, logprobs[:num_taken])

    def finish(self, *, stop_token_id: int | None) -> Chunk | None:
        """End the output; return the last chunk if text was held.

        Args:
            stop_token_id: The token that ended it, if one did.
        """
        if not self._needs_text or self.matched_stop is not None:
            return None
        text = ""
        if self._held_token is not None and (self._include_stop or self._held_token != stop_token_id):
            text += self._scan(self._detokenizer.push(self._held_token))
        self._held_token = None
        if self.matched_stop is None:
            text += self._scan(self._detokenizer.flush())
        if self.matched_stop is None:
            text += self._stops.flush()
        return self._chunk(self.num_tokens, (), text, ())

    def _push_token(self, token_id: int, *, is_stoppable: bool) -> str:
        text = ""
        if self._held_token is not None:
            text = self._detokenizer.push(self._held_token)
            self._held_token = None
        if token_id in self._stop_token_ids:
            self._held_token = token_id
        else:
            text += self._detokenizer.push(token_id)
        return self._scan(text) if is_stoppable else text

    def _scan(self, text: str) -> str:
        result = self._stops.push(text)
        self.matched_stop = result.matched
        return result.text

    def _chunk(
        self,
        index: int,
        token_ids: Sequence[int],
        text: str,
        logprobs: Sequence[gateway_pb2.PositionLogprobs],
    ) -> Chunk | None:
        ids = tuple(token_ids) if self._options.token_ids else ()
        text = text if self._options.text else ""
        converted: tuple[PositionLogprobs, ...] = ()
        if logprobs:
            converted = engine_wire.positions(logprobs, self._table.token_text)
        if not (ids or text or converted):
            return None
        chunk = Chunk(sequence=self._next_chunk, index=index, token_ids=ids, text=text, logprobs=converted)
        self._next_chunk += 1
        return chunk
