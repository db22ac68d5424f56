"""Several gateways behind one client: calls take turns, and one that does not answer is passed over for a while."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import grpc
from loraplex_common.errors import CancelledRequestError, DrainingError, LoraplexError, NoEngineError, RemoteError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Stub = TypeVar("Stub")

DOWN_S: Final = 5.0
"""How long a gateway that did not answer is asked last."""
_ADDRESS_LISTS: Final = ("ipv4:", "ipv6:")


def split_targets(target: str | Sequence[str]) -> tuple[str, ...]:
    """Return the gateways that a target names: one, or several as a sequence or separated by commas.

    Raises:
        ValueError: If it names none.
    """
    given = [target] if isinstance(target, str) else list(target)
    targets: list[str] = []
    for text in given:  # gRPC's own lists of addresses are one target each
        parts = [text] if text.startswith(_ADDRESS_LISTS) else text.split(",")
        targets += [part.strip() for part in parts if part.strip()]
    if not targets:
        raise ValueError("no gateway: give host:port, or several of them")
    return tuple(targets)


@dataclass(frozen=True, slots=True)
class Gateway(Generic[Stub]):
    """One gateway: its number, its target and how to call it."""

    index: int
    target: str
    stub: Stub


class Gateways(Generic[Stub]):
    """The gateways of a client; safe to share between threads.

    Args:
        targets: ``host:port`` of each.
        stubs: As many.
        spare: For a single target, a further way to it, which is not connected until it is needed: behind a proxy or a
            Kubernetes Service another gateway answers there.
        clock: Monotonic seconds.

    Attributes:
        is_closed: Whether the client is closed and no call may begin.
    """

    def __init__(
        self,
        targets: Sequence[str],
        stubs: Sequence[Stub],
        *,
        spare: Stub | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.is_closed = False
        pairs = zip(targets, stubs, strict=True)
        self._gateways = [Gateway(index, target, stub) for index, (target, stub) in enumerate(pairs)]
        self._spare = None if spare is None else Gateway(0, targets[0], spare)
        self._lock = threading.Lock()
        self._down_until = [0.0] * len(self._gateways)
        self._turns = itertools.count()
        self._clock = clock

    def __len__(self) -> int:
        return len(self._gateways)

    def pick(self) -> Gateway[Stub]:
        """Return whose turn it is."""
        return self._first_up(next(self._turns) % len(self._gateways))

    def after(self, gateway: Gateway[Stub], error: LoraplexError) -> Gateway[Stub]:
        """Return the one to ask after a gateway has failed; if it is the only one, itself or the other way to it."""
        if self._spare is not None:
            if is_leaving(error):
                self._swap(gateway)
            return self._gateways[0]
        if error.code is grpc.StatusCode.UNAVAILABLE:
            self._down_until[gateway.index] = self._clock() + DOWN_S
        return self._first_up((gateway.index + 1) % len(self._gateways))

    def _swap(self, leaving: Gateway[Stub]) -> None:
        """Let later calls take the other way; what runs on this one may go on to its end."""
        with self._lock:
            if self._spare is not None and leaving is self._gateways[0]:  # the first of the calls that it ends
                self._gateways[0], self._spare = self._spare, leaving

    def _first_up(self, start: int) -> Gateway[Stub]:
        now = self._clock()
        order = [*self._gateways[start:], *self._gateways[:start]]
        return min(order, key=lambda gateway: max(self._down_until[gateway.index], now))  # the first of equals


def can_help_elsewhere(error: LoraplexError) -> bool:
    """Return whether another gateway may serve what failed so: this one was not reached, is going, or has no engine."""
    if error.code is not grpc.StatusCode.UNAVAILABLE:
        return False
    return error.reason in ("DRAINING", NoEngineError.reason) or is_bare(error)


def is_leaving(error: LoraplexError) -> bool:
    """Return whether a gateway ended a call because it goes away, or because it went before it could say so.

    A single target may be a proxy or a Service, behind which there are others.
    """
    return isinstance(error, DrainingError | CancelledRequestError)


def is_bare(error: LoraplexError) -> bool:
    """Return whether a status is gRPC's own: none of our services has said why."""
    return isinstance(error, RemoteError) and error.reason == error.code.name
