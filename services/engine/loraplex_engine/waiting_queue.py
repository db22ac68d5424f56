"""Requests without a place in a batch, in the order in which they are to be admitted.

*Eligible* ones are looked at by every admission pass. *Parked* ones wait for their adapter to move (to arrive, to be
loaded, to be drained) and cost nothing until it does.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_engine.request import QueueKey, Request


def _queue_key(request: Request) -> QueueKey:
    return request.queue_key


def _remove(requests: list[Request], request: Request) -> None:
    index = bisect_left(requests, request.queue_key, key=_queue_key)
    if index == len(requests) or requests[index] is not request:
        raise RuntimeError(f"request {request.submission.request_id} is not in the queue")
    del requests[index]


class WaitingQueue:
    """All waiting requests; sorted by `Request.queue_key`.

    Attributes:
        eligible: Those worth looking at, first in order first.
        num_tokens: Tokens of all waiting requests that have yet to be computed.
        version: Rises whenever a request comes or goes.
    """

    def __init__(self) -> None:
        self.eligible: list[Request] = []
        self.num_tokens = 0
        self.version = 0
        self._by_digest: dict[str, list[Request]] = {}  # every waiting request with an adapter, parked or not
        self._num_requests = 0

    def __len__(self) -> int:
        return self._num_requests

    def __iter__(self) -> Iterator[Request]:
        yield from self.eligible
        for requests in self._by_digest.values():
            yield from (request for request in requests if request.is_parked)

    def add(self, request: Request) -> None:
        """Take a request in, eligible."""
        request.is_parked = False
        insort(self.eligible, request, key=_queue_key)
        if request.adapter_digest is not None:
            insort(self._by_digest.setdefault(request.adapter_digest, []), request, key=_queue_key)
        self._num_requests += 1
        self.version += 1
        self.num_tokens += request.num_known_tokens

    def remove(self, request: Request) -> None:
        """Let a request go, parked or not."""
        if not request.is_parked:
            _remove(self.eligible, request)
        digest = request.adapter_digest
        if digest is not None:
            _remove(self._by_digest[digest], request)
            if not self._by_digest[digest]:
                del self._by_digest[digest]
        request.is_parked = False
        self._num_requests -= 1
        self.version += 1
        self.num_tokens -= request.num_known_tokens

    def park(self, request: Request, now_s: float) -> None:
        """Stop looking at an eligible request until `unpark`."""
        _remove(self.eligible, request)
        request.is_parked = True
        request.parked_since_s = now_s

    def unpark(self, digest: str, now_s: float) -> None:
        """Look at all requests of an adapter again."""
        parked = [request for request in self._by_digest.get(digest, ()) if request.is_parked]
        for request in parked:
            request.is_parked = False
            request.adapter_load_s += now_s - request.parked_since_s
        self.eligible.extend(parked)
        self.eligible.sort(key=_queue_key)

    def of_adapter(self, digest: str) -> list[Request]:
        """Return a copy of an adapter's waiting requests, first in order first."""
        return list(self._by_digest.get(digest, ()))

    def first_of(self, digest: str) -> Request | None:
        """Return the first request in order that waits with this adapter."""
        requests = self._by_digest.get(digest)
        return requests[0] if requests else None
