"""Compiles constraints once for all requests that want the same, off the event loop and within bounds."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from loraplex_common.errors import InvalidParameterError, LoraplexError

from loraplex_engine.constraints.limits import LEARNED_BYTES, ConstraintLimits
from loraplex_engine.constraints.masks import GrammarMaskFiller, default_num_threads
from loraplex_engine.constraints.matcher import Grammar, GrammarConstraint
from loraplex_engine.constraints.sandbox import Sandbox, TrialProcessError
from loraplex_engine.constraints.tokenizer import FIELD, VocabularySource
from loraplex_engine.constraints.turns import FairTurns, Turn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loraplex_common.structured_output import StructuredOutput


@dataclass(frozen=True, slots=True)
class _Refusal:
    reason: str
    until_s: float


@dataclass(slots=True)
class _Compiled:
    grammar: Grammar
    lexer_bytes: int
    num_counted: int = 1
    """Lexers for which room has been made in the cache."""


@dataclass(eq=False, kw_only=True, slots=True)
class _Running:
    task: asyncio.Task[_Compiled]
    turn: Turn
    num_waiters: int = 0


class CachingCompiler:
    """A `ConstraintCompiler`; belongs to one event loop.

    Requests that want the same constraint share one compile, and what came of it: the least recently used ones go first
    when the cache is full, refusals after some seconds. A compile that no request waits for any more does not begin.

    Args:
        source: The model's tokens.
        limits: What constraints may cost.
    """

    def __init__(self, source: VocabularySource, limits: ConstraintLimits) -> None:
        self._source = source
        self._limits = limits
        self._sandbox = Sandbox(source, limits)
        self._workers = ThreadPoolExecutor(limits.num_compiles, thread_name_prefix="constraints")
        self._turns = FairTurns(limits.num_compiles)
        self._running: dict[bytes, _Running] = {}
        self._kept: OrderedDict[bytes, _Compiled | _Refusal] = OrderedDict()

    async def compile(self, wanted: StructuredOutput, fairness_key: str = "") -> GrammarConstraint:
        """Return the compiled constraint; compiles of different fairness keys take turns.

        Raises:
            InvalidParameterError: If it cannot be compiled, or costs more than a constraint may; the message says why.
            LoraplexError: If the process that tries constraints ended twice.
        """
        num_bytes = len(wanted.text.encode("utf-8", "surrogatepass"))
        if num_bytes > self._limits.max_text_bytes:
            most = self._limits.max_text_bytes
            raise _refused(f"{wanted.kind.value}: it has {num_bytes} bytes; at most {most} are taken")
        key = sha256(f"{wanted.kind.value}\n{wanted.text}".encode("utf-8", "surrogatepass")).digest()
        kept = self._find(key)
        if isinstance(kept, _Refusal):
            raise _refused(kept.reason)
        if kept is None:
            kept = await self._wait_for(key, self._running.get(key) or self._begin(key, wanted), fairness_key)
        if kept.num_counted != kept.grammar.num_lexers:  # earlier outputs needed more
            kept.num_counted = kept.grammar.num_lexers
            self._make_room()
        return GrammarConstraint(kept.grammar, wanted.starts_after)

    async def close(self) -> None:
        """End what runs in other threads and processes."""
        tasks = [running.task for running in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._sandbox.close()
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _begin(self, key: bytes, wanted: StructuredOutput) -> _Running:
        turn = Turn()
        task = asyncio.create_task(self._compile(turn, wanted))
        running = self._running[key] = _Running(task=task, turn=turn)
        task.add_done_callback(lambda _: self._ended(key, running))
        return running

    async def _wait_for(self, key: bytes, running: _Running, fairness_key: str) -> _Compiled:
        self._turns.join(running.turn, fairness_key)
        running.num_waiters += 1
        try:
            return await asyncio.shield(running.task)  # a request that goes away leaves the compile to the others
        finally:
            running.num_waiters -= 1
            is_current = self._running.get(key) is running
            if is_current and not running.num_waiters and not running.turn.has_begun:
                del self._running[key]  # the next request that wants the same begins another
                running.task.cancel()

    def _find(self, key: bytes) -> _Compiled | _Refusal | None:
        kept = self._kept.get(key)
        is_stale = kept.until_s < time.monotonic() if isinstance(kept, _Refusal) else kept and kept.grammar.is_spent
        if is_stale:
            del self._kept[key]
            return None
        if kept is not None:
            self._kept.move_to_end(key)
        return kept

    def _ended(self, key: bytes, running: _Running) -> None:
        """Keep what came of a compile; one that was cancelled, or failed by a fault of ours, is not kept."""
        self._turns.leave(running.turn)
        if self._running.get(key) is running:
            del self._running[key]
        task = running.task
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._kept[key] = task.result()
        elif isinstance(error, InvalidParameterError):
            self._kept[key] = _Refusal(error.message, time.monotonic() + self._limits.refusal_ttl_s)
        self._make_room()

    def _make_room(self) -> None:
        """Drop what was used least recently."""
        while len(self._kept) > self._limits.max_cache_entries or self._kept_bytes() > self._limits.max_cache_bytes:
            self._kept.popitem(last=False)

    def _kept_bytes(self) -> int:
        return sum(each.lexer_bytes * each.num_counted for each in self._kept.values() if isinstance(each, _Compiled))

    async def _compile(self, turn: Turn, wanted: StructuredOutput) -> _Compiled:
        await turn.came
        loop = asyncio.get_running_loop()
        vocabulary = await loop.run_in_executor(self._workers, self._source.get)
        text, num_bytes = await self._try_out(wanted)
        num_bytes += len(text) + LEARNED_BYTES
        limits = self._limits
        grammar = await loop.run_in_executor(
            self._workers, Grammar, text, vocabulary, limits.of_library(), limits.lexers_of(num_bytes)
        )
        return _Compiled(grammar, num_bytes)

    async def _try_out(self, wanted: StructuredOutput) -> tuple[str, int]:
        try:
            return await self._sandbox.try_out(wanted)
        except TrialProcessError:
            pass  # whatever ended it, another is started
        try:
            return await self._sandbox.try_out(wanted)
        except TrialProcessError as error:
            raise LoraplexError(f"{error}: see the engine's log") from error


def _refused(reason: str) -> InvalidParameterError:
    return InvalidParameterError(reason, field=FIELD)


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraints:
    """What an engine needs for structured output.

    Attributes:
        compiler: Makes constraints; belongs to the event loop that made it.
        filler: Fills masks.
    """

    compiler: CachingCompiler
    filler: GrammarMaskFiller

    async def close(self) -> None:
        """End what runs in other threads and processes."""
        await self.compiler.close()


def make_constraints(
    model: Path,
    *,
    vocab_size: int,
    eos_token_ids: Sequence[int],
    limits: ConstraintLimits | None = None,
    num_threads: int | None = None,
) -> Constraints:
    """Return the compiler and the filler of an engine; nothing is read before the first constraint.

    Args:
        model: Directory of the base model.
        vocab_size: Rows of its embedding.
        eos_token_ids: Its end-of-text ids.
        limits: What constraints may cost; None takes the defaults.
        num_threads: Threads that fill masks; None takes most of the cores.
    """
    source = VocabularySource(model, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
    limits, num_threads = limits or ConstraintLimits(), num_threads or default_num_threads()
    limits = replace(limits, max_lexers=min(limits.max_lexers, num_threads))  # further ones would have no thread
    return Constraints(compiler=CachingCompiler(source, limits), filler=GrammarMaskFiller(source, num_threads))
