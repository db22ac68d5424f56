"""Load tests: a trace's requests sent to a gateway at their times, whatever comes back, and what came back."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_common.errors import LoraplexError
from numpy.typing import NDArray

from loraplex_client.workload import NO_ADAPTER, NO_CONVERSATION, Measured, prompt_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_client._aio.client import AsyncClient
    from loraplex_client.workload import Trace, TraceRequest

DEFAULT_VOCAB_SIZE: Final = 32000
DEFAULT_TIMEOUT_S: Final = 600.0

Said = list[int]
"""Token ids of a conversation so far, prompts and answers."""


class LoadError(ValueError):
    """A load that cannot be sent; the message says what would have to change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadResult:
    """What a load test saw.

    Attributes:
        measured: Times, tokens and ends of the requests.
        errors: Reason of `LoraplexError` -> requests that failed with it.
        num_resumes: How often streams went on after their connection or gateway was lost.
        lag_s: float64 ``[n]``; how long after its due time the tester sent each request, nan where it did not. Waits include
            it: a large one says that the tester, not the deployment, is too slow.
    """

    measured: Measured
    errors: Counter[str]
    lag_s: NDArray[np.float64]
    num_resumes: int = 0


class LoadTest:
    """One trace against one gateway, open loop: a slow answer does not hold back the requests after it.

    A turn of a conversation is due at its arrival or at the end of the turn before, whichever is later, and repeats what
    was said; where the turn before failed, it fails, too. Answers are greedy and exactly as long as the trace says.

    Args:
        client: Client of the gateway.
        trace: The requests.
        adapters: Names of the trace's adapters, by index.
        model: Base model, where the gateway fronts several.
        seed: Prompts of different seeds share no prefix.
        vocab_size: Prompts are random token ids below it.
        timeout_s: Deadline of each request.

    Raises:
        LoadError: If the trace is empty or names more adapters than there are.
    """

    def __init__(
        self,
        client: AsyncClient,
        trace: Trace,
        adapters: Sequence[str],
        *,
        model: str = "",
        seed: int = 0,
        vocab_size: int = DEFAULT_VOCAB_SIZE,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        needed = int(trace.adapter.max(initial=NO_ADAPTER)) + 1
        if len(trace) == 0:
            raise LoadError("the workload has no requests")
        if needed > len(adapters):
            raise LoadError(
                f"the workload asks for {needed} adapters, the gateway serves {len(adapters)}: "
                "import more, or make some with loraplex adapters make-random"
            )
        self._client, self._trace, self._adapters = client, trace, adapters
        self._model, self._seed, self._vocab_size, self._timeout_s = model, seed, vocab_size, timeout_s
        self._begin_s = 0.0
        count = len(trace)
        self._due_s = trace.arrival_s.copy()
        self._sent_s, self._first_s, self._last_s = (np.full(count, np.nan) for _ in range(3))
        self._num_tokens = np.zeros(count, dtype=np.int64)
        self._is_finished = np.zeros(count, dtype=np.bool_)
        self._errors: Counter[str] = Counter()
        self._num_resumes = 0
        self._failures: list[str] = []

    async def run(self, *, limit_s: float | None = None) -> LoadResult:
        """Send everything and wait for the ends.

        Args:
            limit_s: When to stop, from the start; what is open then is cancelled and counts as unfinished.
        """
        self._begin_s = time.perf_counter()
        said: dict[int, asyncio.Task[Said | None]] = {}  # by conversation: its last turn
        tasks: list[asyncio.Task[Said | None]] = []
        for request in self._trace:
            task = asyncio.create_task(self._answer(request, said.get(request.conversation)))
            tasks.append(task)
            if request.conversation != NO_CONVERSATION:
                said[request.conversation] = task
        try:
            _, still_open = await asyncio.wait(tasks, timeout=limit_s)
        finally:
            for task in tasks:
                task.cancel()
        now_s, last_s = self._now_s(), float(np.nan_to_num(self._last_s).max())
        wall_s = now_s if still_open or last_s == 0.0 else last_s
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended  # a defect of ours: what requests fail with is counted
        measured = Measured(
            trace=self._trace,
            due_s=self._due_s,
            first_s=self._first_s,
            last_s=self._last_s,
            num_tokens=self._num_tokens,
            is_finished=self._is_finished,
            wall_s=wall_s,
            failures=self._failures,
        )
        return LoadResult(
            measured=measured,
            errors=self._errors,
            lag_s=self._sent_s - self._due_s,
            num_resumes=self._num_resumes,
        )

    def _now_s(self) -> float:
        return time.perf_counter() - self._begin_s

    async def _answer(self, request: TraceRequest, turn_before: asyncio.Task[Said | None] | None) -> Said | None:
        """Send one request at its time and read it to its end; return what was said so far, None if it failed."""
        await asyncio.sleep(request.arrival_s - self._now_s())
        said: Said | None = []
        if turn_before is not None:
            said = await turn_before
            self._due_s[request.index] = max(request.arrival_s, self._now_s())
        if said is None:
            self._fail(request, "TURN_BEFORE_FAILED", "the turn before failed")
            return None
        new = prompt_ids(self._seed, request.index, request.prompt_tokens - len(said), vocab_size=self._vocab_size)
        prompt = [*said, *new.tolist()]
        try:
            return prompt + await self._read(request, prompt)
        except LoraplexError as error:
            self._fail(request, error.reason, error.message)
            return None

    async def _read(self, request: TraceRequest, prompt: list[int]) -> list[int]:
        index, tokens = request.index, list[int]()
        self._sent_s[index] = self._now_s()
        stream = self._client.generate(
            prompt_token_ids=prompt,
            adapter=None if request.adapter == NO_ADAPTER else self._adapters[request.adapter],
            model=self._model or None,
            max_new_tokens=request.output_tokens,
            ignore_eos=True,
            temperature=0.0,
            timeout=self._timeout_s,
        )
        async with stream:
            async for event in stream:
                if not event.token_ids:
                    continue
                self._last_s[index] = self._now_s()
                if not tokens:
                    self._first_s[index] = self._last_s[index]
                tokens += event.token_ids
                self._num_tokens[index] = len(tokens)
        self._num_resumes += stream.num_resumes
        self._is_finished[index] = len(tokens) == request.output_tokens
        return tokens

    def _fail(self, request: TraceRequest, reason: str, message: str) -> None:
        self._errors[reason] += 1
        self._failures.append(f"request {request.index}: {reason}: {message}")
