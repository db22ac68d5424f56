"""From an engine's tokens to the chunks a client sees: text, stop strings, log-probabilities, positions."""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING

from loraplex_gateway.engines import wire
from loraplex_gateway.text.detokenizer import make_detokenizer
from loraplex_gateway.text.stops import StopMatcher
from loraplex_gateway.types import Chunk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_gateway.text.token_table import TokenTable
    from loraplex_gateway.types import PositionLogprobs, ResponseOptions, Stopping


class OutputAssembler:
    """The output of one request.

    Args:
        table: The model's tokens.
        options: What the chunks carry.
        stopping: Stop strings, and whether what stopped stays in the text.
        stop_token_ids: Ids that end the output; the text of the one that did is left out unless `include_stop`.
        prompt_ids: What the output continues; None for an unknown text.
        shown_ids: Special tokens that have text although the others are left out.

    Attributes:
        num_tokens: Output tokens so far, up to the one that completed a stop string.
        num_text_bytes: UTF-8 of the text of the tokens that were replayed. Like the text it depends on the tokens alone, not
            on how they came.
        matched_stop: The stop string that ended the output, if one did.
    """

    def __init__(
        self,
        table: TokenTable,
        *,
        options: ResponseOptions,
        stopping: Stopping,
        stop_token_ids: frozenset[int],
        prompt_ids: Sequence[int] | None = None,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.num_tokens = self.num_text_bytes = 0
        self.matched_stop: str | None = None
        self._table = table
        self._options = options
        self._include_stop = stopping.include_stop
        # An engine draws one token at least, in the step that ends the prompt.
        self._drops_all = stopping.max_new_tokens == 0
        self._min_new_tokens = stopping.min_new_tokens or 0
        self._stop_token_ids = stop_token_ids
        self._needs_text = options.text or bool(stopping.stop_strings)
        skips = options.skip_special_tokens
        self._hidden_ids = table.special_ids - shown_ids if skips else frozenset()
        self._detokenizer = make_detokenizer(
            table, skip_special_tokens=skips, prompt_ids=prompt_ids, shown_ids=shown_ids
        )
        self._stops = StopMatcher(stopping.stop_strings, include_stop=stopping.include_stop)
        self._num_characters = 0  # of the text before stop strings are looked for
        # A stop token whose text is held until it is known whether the output really ends here: with min_new_tokens
        # only the engine can tell.
        self._held_token: int | None = None
        self._next_chunk = 0

    def push(self, token_ids: Sequence[int], logprobs: Sequence[wire.LogprobsMessage]) -> Chunk | None:
        """Add tokens; return a chunk if there is anything to send. Tokens behind a stop string are dropped."""
        if self._drops_all:
            return None
        index, num_taken = self.num_tokens, 0
        pieces: list[str] = []
        offsets: list[int] = []
        for position, token_id in enumerate(token_ids):
            is_stoppable = index + position >= self._min_new_tokens
            if self._needs_text:
                pieces.append(self._release_held_token(is_stoppable=is_stoppable))
                if self.matched_stop is not None:
                    break
                offsets.append(self._num_characters + self._detokenizer.num_held)
                pieces.append(self._push_token(token_id, is_stoppable=is_stoppable))
            num_taken += 1
            if self.matched_stop is not None:
                break
        self.num_tokens += num_taken
        return self._chunk(index, token_ids[:num_taken], "".join(pieces), logprobs[:num_taken], offsets)

    def replay(self, token_ids: Sequence[int]) -> None:
        """Add tokens whose chunks the client has already."""
        chunk = self.push(token_ids, ())
        if chunk is not None:
            self.num_text_bytes += len(chunk.text.encode())

    def go_on(self, *, next_sequence: int) -> None:
        """Number chunks from here on."""
        self._next_chunk = next_sequence

    def finish(self, *, stop_token_id: int | None) -> Chunk | None:
        """End the output; return the last chunk if text was held.

        Args:
            stop_token_id: The token that ended it, if one did.
        """
        if not self._needs_text or self.matched_stop is not None:
            return None
        last, text = self._held_token, ""
        if last is not None and (self._include_stop or last != stop_token_id):
            text, last = self._release_held_token(is_stoppable=True), None
        if self.matched_stop is None:
            text += self._scan(self._counted(self._detokenizer.flush()))
        if last is not None and self.matched_stop is None:
            text += self._scan(self._table.token_text(last), is_shown=False)
        if self.matched_stop is None:
            text += self._stops.flush()
        self._held_token = None
        return self._chunk(self.num_tokens, (), text, (), ())

    def _push_token(self, token_id: int, *, is_stoppable: bool) -> str:
        if token_id in self._stop_token_ids:
            self._held_token = token_id
            return ""
        return self._read(token_id, is_stoppable=is_stoppable)

    def _release_held_token(self, *, is_stoppable: bool) -> str:
        """Read the held stop token after all: it did not end the output, or its text is wanted."""
        held, self._held_token = self._held_token, None
        return "" if held is None else self._read(held, is_stoppable=is_stoppable)

    def _read(self, token_id: int, *, is_stoppable: bool) -> str:
        """Return the text that may go out with this token; stop strings see the tokens that have no text, too."""
        if not (is_stoppable and self._stops.is_needed):
            return self._counted(self._detokenizer.push(token_id))
        if token_id in self._hidden_ids:
            text = self._scan(self._counted(self._detokenizer.settle()))
            return text + self._scan(self._table.token_text(token_id), is_shown=False)
        text = self._scan(self._counted(self._detokenizer.push(token_id)))
        if self.matched_stop is None and self._stops.would_match(self._detokenizer.preview):
            text += self._scan(self._counted(self._detokenizer.settle()))
        return text

    def _counted(self, text: str) -> str:
        self._num_characters += len(text)
        return text

    def _scan(self, text: str, *, is_shown: bool = True) -> str:
        if self.matched_stop is not None:
            return ""
        result = self._stops.push(text, is_shown=is_shown)
        self.matched_stop = result.matched
        return result.text

    def _chunk(
        self,
        index: int,
        token_ids: Sequence[int],
        text: str,
        logprobs: Sequence[wire.LogprobsMessage],
        text_offsets: Sequence[int],
    ) -> Chunk | None:
        ids = tuple(token_ids) if self._options.token_ids else ()
        text = text if self._options.text else ""
        converted: tuple[PositionLogprobs, ...] = ()
        if logprobs:
            converted = wire.positions(logprobs, self._table.token_bytes, text_offsets or repeat(0))
        if not (ids or text or converted):
            return None
        chunk = Chunk(sequence=self._next_chunk, index=index, token_ids=ids, text=text, logprobs=converted)
        self._next_chunk += 1
        return chunk
