"""Running calls by the credential that let them in: when the credential ends, the call is ended."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import UnauthenticatedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loraplex_common.auth import Principal

END_AGAIN_S: Final = 5.0
"""How long a call may take to end before it is asked again; asked too soon, its clean-up would be cut short."""


class Admission:
    """One caller that was let in.

    Args:
        principal: The caller.
        credential: The credential's key in the keys file; None if callers need no credentials.
        book: Has an entry of it while its call runs.

    Attributes:
        has_lapsed: Whether the credential has been taken away meanwhile.
    """

    def __init__(self, principal: Principal, credential: bytes | None, book: Admissions) -> None:
        self.principal = principal
        self.credential = credential
        self.has_lapsed = False
        self._book = book

    @property
    def is_open(self) -> bool:
        """Whether it was let in without a credential, as every caller is."""
        return self.credential is None

    @contextmanager
    def running(self, end: Callable[[], object]) -> Iterator[None]:
        """Watch the credential during the block, and end the block when the credential ends.

        Args:
            end: Called on the event loop once the credential is gone, and again after `END_AGAIN_S` if the block has
                not ended by then. A block that is ended so raises `error`.

        Raises:
            UnauthenticatedError: If the credential is gone already.
        """
        if self.is_open:
            yield
            return
        if not self._book.is_good(self):
            self.has_lapsed = True
            raise self.error()
        self._book.enter(self, end)
        try:
            yield
        finally:
            self._book.leave(self)

    def error(self) -> UnauthenticatedError:
        """Return the error of a call whose credential has been taken away."""
        return UnauthenticatedError("the key or certificate that this call came with is not let in any more")


class Admissions:
    """The running calls, and how to end each of them.

    Args:
        principals: Principals that are let in now, by credential.
        clock: Monotonic seconds.
    """

    def __init__(self, principals: Callable[[], dict[bytes, Principal]], clock: Callable[[], float]) -> None:
        self._principals = principals
        self._clock = clock
        self._running: dict[Admission, Callable[[], object]] = {}
        self._ended_at: dict[Admission, float] = {}

    @property
    def num_running(self) -> int:
        """Number of running calls."""
        return len(self._running)

    @property
    def has_lapsed(self) -> bool:
        """Whether some calls were asked to end and have not ended yet."""
        return bool(self._ended_at)

    def is_good(self, admission: Admission) -> bool:
        """Whether a credential still stands for the same principal: the same name in the same role."""
        if admission.credential is None:
            return True
        now, then = self._principals().get(admission.credential), admission.principal
        return now is not None and (now.name, now.role) == (then.name, then.role)

    def enter(self, admission: Admission, end: Callable[[], object]) -> None:
        """Note that a call runs."""
        self._running[admission] = end

    def leave(self, admission: Admission) -> None:
        """Note that a call has ended."""
        self._running.pop(admission, None)
        self._ended_at.pop(admission, None)

    def end_lapsed(self) -> int:
        """End the calls whose credential is gone; return how many of them still run."""
        now = self._clock()
        lapsed = [admission for admission in self._running if admission.has_lapsed or not self.is_good(admission)]
        for admission in lapsed:
            admission.has_lapsed = True
            if now - self._ended_at.get(admission, -END_AGAIN_S) >= END_AGAIN_S:
                self._ended_at[admission] = now
                self._running[admission]()
        return len(lapsed)
