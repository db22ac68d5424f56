"""How often a request is sent once more after engines lost or refused it; a new token clears the account."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.errors import (
    DrainingError,
    EngineHungError,
    EngineOomError,
    NoEngineError,
    RequestLostError,
    StoreUnavailableError,
)

from loraplex_gateway.engines.ticket import EngineLostError

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_REFUSALS: Final = 4
"""Engines that may refuse a request between two of its tokens, each for reasons of its own."""
MAX_FRUITLESS_LOSSES: Final = 2
"""Sessions in a row that may be lost with a request before it has given a token there.

Seen from here, a request that ends its engine's session and one that is unlucky look alike. What tells them apart is
progress: a request that gets tokens survives engine after engine, as before; a request that has twice gone down with a
session without a token is not sent a third time, as every attempt interrupts all other streams there.
"""
OUTAGE_PAUSE_S: Final = 0.5
"""Between two attempts of a request whose adapter no engine can get from the store at the moment."""
# What an engine refuses that another may take.
ELSEWHERE: Final = (DrainingError, NoEngineError, EngineOomError, EngineHungError)


class Attempts:
    """What has become of a request's attempts since its last token.

    Args:
        clock: Monotonic seconds.
        outage_s: How long the adapter store may be out of reach before a request that has begun is given up.

    Attributes:
        excluded: Engines that refused it.
    """

    def __init__(self, *, clock: Callable[[], float], outage_s: float) -> None:
        self._clock = clock
        self._outage_s = outage_s
        self.excluded: frozenset[str] = frozenset()
        self._num_fruitless_losses = 0
        self._num_refusals = 0
        self._outage_since: float | None = None

    @staticmethod
    def may_follow(failure: Exception, *, has_begun: bool) -> bool:
        """Tell whether another attempt may bring what this one did not.

        A request that has not begun hears of the store's outage at once. One that has begun has had its adapter: it lost
        it with its engine, and a client cannot send its stream again over every API.
        """
        return isinstance(failure, (EngineLostError, *ELSEWHERE)) or (
            has_begun and isinstance(failure, StoreUnavailableError)
        )

    def count(self, failure: Exception, engine_id: str, *, has_progressed: bool) -> None:
        """Take in that an engine did not bring the request to its end."""
        if has_progressed:
            self._num_fruitless_losses = self._num_refusals = 0
            self.excluded, self._outage_since = frozenset(), None
        if isinstance(failure, StoreUnavailableError):
            self._outage_since = self._clock() if self._outage_since is None else self._outage_since
        elif not isinstance(failure, EngineLostError):
            self._num_refusals += 1
            self.excluded |= {engine_id}
        elif not has_progressed:
            self._num_fruitless_losses += failure.had_request

    @property
    def are_spent(self) -> bool:
        """Whether the request has been refused by so many engines, or for so long, that it is not sent again."""
        outage_s = 0.0 if self._outage_since is None else self._clock() - self._outage_since
        return self._num_refusals >= MAX_REFUSALS or outage_s > self._outage_s

    @property
    def is_suspect(self) -> bool:
        """Whether the request may be what ends the sessions it is sent to."""
        return self._num_fruitless_losses >= MAX_FRUITLESS_LOSSES

    def lost(self, cause: Exception, *, num_tokens: int) -> RequestLostError:
        """Return what a suspect request ends with."""
        return RequestLostError(
            f"the sessions of {self._num_fruitless_losses} engines ended after this request was sent and before it "
            f"gave a token; it is not sent again. The last one: {cause}",
            metadata={"output_tokens": str(num_tokens)},
        )
