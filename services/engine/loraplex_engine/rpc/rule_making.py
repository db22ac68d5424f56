"""Makes the rules of outputs before their requests reach the step loop, which waits for no compile."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from loraplex_common.errors import DeadlineError, LoraplexError, QueueTimeoutError

from loraplex_engine.constraints.banned_sequences import BannedSequences
from loraplex_engine.constraints.output_rules import OutputRules
from loraplex_engine.faults import internal_error
from loraplex_engine.messages import Ended, FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_engine.constraints.types import ConstraintCompiler, ConstraintState
    from loraplex_engine.messages import Submission


class RuleMaker:
    """Makes the rules of one engine's outputs.

    Args:
        compiler: Compiles structures, off the event loop.
        eos_token_ids: The model's end-of-text ids.
    """

    def __init__(self, compiler: ConstraintCompiler, eos_token_ids: tuple[int, ...]) -> None:
        self._compiler = compiler
        self._eos_token_ids = eos_token_ids

    async def make(self, submission: Submission) -> OutputRules:
        """Return the rules of a request's output, the resumed tokens taken in.

        Raises:
            InvalidParameterError: If the structure cannot be compiled, or does not allow the resumed tokens.
        """
        resumed: list[int] = submission.resumed_token_ids.tolist()
        structure: ConstraintState | None = None
        if submission.structured_output is not None:
            compiled = await self._compiler.compile(submission.structured_output, submission.fairness_key)
            structure = await asyncio.to_thread(compiled.start, resumed)
        bad = submission.bad_token_sequences
        return OutputRules(
            structure,
            BannedSequences(bad, resumed) if bad else None,
            eos_token_ids=self._eos_token_ids,
            stop_token_ids=submission.stopping.stop_token_ids,
        )


class PendingRules:
    """Requests of one session whose rules are being made; each ends in ``on_made`` or ``on_end``, unless it is forgotten.

    Args:
        maker: Makes the rules.
        on_made: Gets a request with its rules.
        on_end: Gets the end of a request that has failed, or passed a limit of its time.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        maker: RuleMaker,
        *,
        on_made: Callable[[Submission, OutputRules], None],
        on_end: Callable[[Ended], None],
        clock: Callable[[], float],
    ) -> None:
        self._maker = maker
        self._on_made, self._on_end = on_made, on_end
        self._clock = clock
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def begin(self, submission: Submission) -> None:
        """Make the rules of a request."""
        slot = submission.session_slot
        self._tasks[slot] = asyncio.create_task(self._make(submission), name=f"rules-{slot}")

    def abort(self, slot: int) -> bool:
        """End a request with CANCELLED; False if its rules are not being made."""
        task = self._tasks.pop(slot, None)
        if task is None:
            return False
        task.cancel()
        self._on_end(Ended(session_slot=slot, finish_reason=FinishReason.CANCELLED))
        return True

    def forget_all(self) -> list[asyncio.Task[None]]:
        """Return the tasks that are under way, to be cancelled: their requests need no end any more."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        return tasks

    async def _make(self, submission: Submission) -> None:
        outcome = await self._outcome(submission)
        del self._tasks[submission.session_slot]
        if isinstance(outcome, OutputRules):
            self._on_made(submission, outcome)
        else:
            self._on_end(outcome)

    async def _outcome(self, submission: Submission) -> OutputRules | Ended:
        slot = submission.session_slot
        try:
            async with asyncio.timeout(self._time_left_s(submission)):
                return await self._maker.make(submission)
        except TimeoutError:
            return overdue(submission, self._clock())
        except LoraplexError as error:
            return Ended(session_slot=slot, error=error)
        except Exception as error:
            failure = internal_error("while its structure was compiled", error, request_id=submission.request_id)
            return Ended(session_slot=slot, error=failure)

    def _time_left_s(self, submission: Submission) -> float | None:
        limits = (submission.deadline_s, submission.queue_deadline_s, submission.time_limit_at_s)
        first_s = min((moment for moment in limits if moment is not None), default=None)
        return None if first_s is None else max(0.0, first_s - self._clock())


def overdue(submission: Submission, now_s: float) -> Ended:
    """Return the end of a request that has passed a limit of its time before it reached the step loop."""
    slot, waited_s = submission.session_slot, now_s - submission.arrived_s
    if submission.deadline_s is not None and submission.deadline_s <= now_s:
        return Ended(session_slot=slot, error=DeadlineError("the client's deadline passed"), queue_s=waited_s)
    if submission.time_limit_at_s is not None and submission.time_limit_at_s <= now_s:
        return Ended(session_slot=slot, finish_reason=FinishReason.TIME_LIMIT, queue_s=waited_s)
    error = QueueTimeoutError(
        f"no place in a batch within {waited_s:.3f} s: its structured output is still being compiled",
        retry_after_s=1.0,
        drop_reason="rejected-ttl-expired",
    )
    return Ended(session_slot=slot, error=error, queue_s=waited_s)
