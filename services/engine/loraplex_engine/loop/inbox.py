"""Commands on their way to the step loop, and the registry of sessions that its outputs go to."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from loraplex_engine.messages import Call, CloseSession, Command, Ended, StepOutputs, Submit

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_common.errors import LoraplexError

    from loraplex_engine.loop.outbox import SessionOutbox

_NO_TOKENS = np.empty(0, dtype=np.int32)


class Sessions:
    """Outboxes by session id. Any thread may open one; the loop's thread does everything else."""

    def __init__(self) -> None:
        self._outboxes: dict[int, SessionOutbox] = {}
        self._ids = itertools.count(1)

    def __contains__(self, session_id: int) -> bool:
        return session_id in self._outboxes

    def open(self, make_outbox: Callable[[int], SessionOutbox]) -> SessionOutbox:
        """Register an outbox under a new session id."""
        outbox = make_outbox(next(self._ids))
        self._outboxes[outbox.session_id] = outbox
        return outbox

    def close(self, session_id: int, error: LoraplexError | None = None) -> None:
        """Forget a session and end its outbox."""
        outbox = self._outboxes.pop(session_id, None)
        if outbox is not None:
            outbox.close(error)

    def close_all(self, error: LoraplexError | None = None) -> None:
        """End every outbox; the sessions stay registered, so that late submissions still get an answer."""
        for outbox in list(self._outboxes.values()):
            outbox.close(error)

    def put(self, session_id: int, outputs: StepOutputs) -> bool:
        """Send outputs to a session; False if the session has been closed for its backlog."""
        outbox = self._outboxes.get(session_id)
        return outbox is None or outbox.put(outputs)

    def refuse(self, session_id: int, session_slot: int, error: LoraplexError) -> None:
        """Send a request's end without any accounting, as the loop is over."""
        ended = StepOutputs(
            step_id=0,
            token_slots=_NO_TOKENS,
            token_positions=_NO_TOKENS,
            token_ids=_NO_TOKENS,
            events=[Ended(session_slot=session_slot, error=error)],
        )
        self.put(session_id, ended)


class Inbox:
    """Commands from any thread to the loop's thread; once it is shut, the posting thread answers its command."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._wake = threading.Event()
        self._lock = threading.Lock()  # no command may come after the loop's last look unanswered
        self._commands: deque[Command] = deque()
        self._refusal: LoraplexError | None = None

    @property
    def is_open(self) -> bool:
        """True while the loop reads the inbox."""
        return self._refusal is None

    @property
    def has_commands(self) -> bool:
        """Whether a command waits for the loop."""
        return bool(self._commands)

    def post(self, command: Command) -> None:
        """Add a command and wake the loop."""
        with self._lock:
            refusal = self._refusal
            if refusal is None:
                self._commands.append(command)
        if refusal is None:
            self._wake.set()
        else:
            self._refuse(command, refusal)

    def wake(self) -> None:
        """Wake the loop without a command."""
        self._wake.set()

    def wait(self, timeout_s: float | None) -> None:
        """Sleep until a command is posted, `wake` is called or the time is over."""
        self._wake.wait(timeout_s)

    def take(self) -> list[Command]:
        """Return and forget the commands posted so far."""
        self._wake.clear()  # first: a command posted from here on wakes the loop again
        return [self._commands.popleft() for _ in range(len(self._commands))]

    def shut(self, error: LoraplexError) -> None:
        """Refuse the commands that are left and all later ones."""
        with self._lock:
            self._refusal = error
        for command in self.take():
            self._refuse(command, error)

    def _refuse(self, command: Command, error: LoraplexError) -> None:
        if isinstance(command, Submit):
            self._sessions.refuse(command.submission.session_id, command.submission.session_slot, error)
        elif isinstance(command, CloseSession):
            self._sessions.close(command.session_id)
        elif isinstance(command, Call) and command.future.set_running_or_notify_cancel():
            command.future.set_exception(error)
