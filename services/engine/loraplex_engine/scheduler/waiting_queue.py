"""Requests without a place in a batch, in the order in which they are to be admitted.

Order: the class of service; within a class, the fairness key served least (`fair_shares`); within a key, the oldest
request, or the newest with the policy `newest-first` while the line is overloaded. A request that waits long behind a
higher class rises one class at a time, so no class waits for ever behind another. A request that only waits for its own
class's turn does not rise: otherwise a key that sends more than its share would overtake the others of its class by the
age of its backlog. Each decision costs O(log n).

Admission looks at *eligible* requests. *Parked* requests wait for their adapter to change state (to arrive, to be
loaded, to be drained) and cost nothing until it does.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING, Final

from loraplex_engine.limits import DEFAULT_PROMOTE_AFTER_S, QueuePolicy
from loraplex_engine.messages import Priority
from loraplex_engine.scheduler.fair_shares import FairShares
from loraplex_engine.scheduler.queue_lines import Line
from loraplex_engine.scheduler.request import Request, RequestState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

OVERLOAD_SHARE: Final = 0.5
"""Share of the objective: a line whose oldest request has waited longer is overloaded."""
_LEVELS: Final = tuple(sorted((int(priority) for priority in Priority), reverse=True))


class WaitingQueue:
    """All waiting requests.

    Args:
        shares: Counters of fairness keys.
        policy: Which request of a key goes first.
        ttft_slo_s: Objective that tells when a line is overloaded.
        promote_after_s: Waiting time after which a request rises a class.

    Attributes:
        shares: Counters of fairness keys.
        num_tokens: Tokens of all waiting requests that have yet to be computed.
        version: Rises whenever a request comes, goes or becomes eligible.
    """

    def __init__(
        self,
        shares: FairShares | None = None,
        *,
        policy: QueuePolicy = QueuePolicy.FCFS,
        ttft_slo_s: float | None = None,
        promote_after_s: float = DEFAULT_PROMOTE_AFTER_S,
    ) -> None:
        self.shares = FairShares() if shares is None else shares
        self.num_tokens = 0
        self.version = 0
        self._overload_s = OVERLOAD_SHARE * ttft_slo_s if ttft_slo_s and policy is QueuePolicy.NEWEST_FIRST else None
        self._promote_after_s = promote_after_s
        self._lines: dict[tuple[int, int], Line] = {}  # (level, share)
        self._keys: dict[int, list[tuple[float, int, int]]] = {level: [] for level in _LEVELS}
        self._listed: set[tuple[int, int]] = set()  # lines with an entry in `_keys`
        self._capped: set[tuple[int, int]] = set()  # lines off `_keys` until a request of their key leaves its slot
        self._ages: dict[int, list[tuple[float, int, int, Request]]] = {level: [] for level in _LEVELS}
        self._num_came = dict.fromkeys(_LEVELS, 0)  # requests that ever waited at each level
        self._num_at = dict.fromkeys(_LEVELS, 0)  # requests that wait at each level now
        self._aside: list[Request] = []
        self._by_digest: dict[
            str, dict[int, Request]
        ] = {}  # waiting requests under each of their adapters, parked or not
        self._adding_up: dict[int, Request] = {}  # those with several adapters
        self._num_requests = 0

    def __len__(self) -> int:
        return self._num_requests

    def __iter__(self) -> Iterator[Request]:
        yield from self.eligible
        for digest, requests in self._by_digest.items():
            yield from (each for each in requests.values() if each.is_parked and each.digests[0] == digest)

    @property
    def eligible(self) -> list[Request]:
        """The eligible requests, in no particular order."""
        return [request for line in self._lines.values() for request in line] + self._aside

    # --- coming and going ---

    def add(self, request: Request) -> None:
        """Take a request in, eligible."""
        if request.share < 0:
            request.share = self.shares.enter(request.submission.fairness_key)
        self.shares.wait(request.share)
        request.is_parked = False
        for digest in request.digests:
            self._by_digest.setdefault(digest, {})[request.number] = request
        if request.adds_up:
            self._adding_up[request.number] = request
        self._num_requests += 1
        self.num_tokens += request.num_known_tokens
        self._line_up(request)
        self._num_at[request.level] += 1
        self._num_came[request.level] += 1
        risen = request.level - request.submission.priority + 1
        self._age(request, request.arrived_s + risen * self._promote_after_s)

    def remove(self, request: Request) -> None:
        """Let a request go, parked or not.

        Raises:
            KeyError: If it is not in the queue.
        """
        if not request.is_parked:
            self._step_out(request)
        for digest in request.digests:
            del self._by_digest[digest][request.number]
            if not self._by_digest[digest]:
                del self._by_digest[digest]
        self._adding_up.pop(request.number, None)
        request.is_parked = False
        self._num_requests -= 1
        self._num_at[request.level] -= 1
        self.version += 1
        self.num_tokens -= request.num_known_tokens
        self.shares.cease_to_wait(request.share)

    def park(self, request: Request, now_s: float) -> None:
        """Stop looking at an eligible request until `unpark`."""
        self._step_out(request)
        request.is_parked = True
        request.parked_since_s = now_s

    def has_parked(self, digests: Iterable[str]) -> bool:
        """Tell whether a request waits for one of these adapters to change its state."""
        return any(request.is_parked for digest in digests for request in self._by_digest.get(digest, {}).values())

    def unpark(self, digest: str, now_s: float) -> None:
        """Look at all requests with an adapter again."""
        for request in [request for request in self._by_digest.get(digest, {}).values() if request.is_parked]:
            request.is_parked = False
            request.adapter_load_s += now_s - request.parked_since_s
            self._line_up(request)

    def _line_up(self, request: Request) -> None:
        place = (request.level, request.share)
        line = self._lines.get(place)
        if line is None:
            line = self._lines[place] = Line(has_newest=self._overload_s is not None)
        line.add(request)
        self.shares.become_eligible(request.share)
        self._list(place, request.number)
        self.version += 1

    def _step_out(self, request: Request) -> None:
        place = (request.level, request.share)
        line = self._lines[place]
        line.remove(request)
        if not line:
            del self._lines[place]
        self.shares.cease_to_be_eligible(request.share)

    def _list(self, place: tuple[int, int], number: int) -> None:
        if place not in self._listed and place not in self._capped:
            level, share = place
            heapq.heappush(self._keys[level], (self.shares.service(share), number, share))
            self._listed.add(place)

    # --- order ---

    def first(self, now_s: float) -> Request | None:
        """Return the next request; None if no eligible request may run."""
        for level in _LEVELS:
            line = self._first_line(level)
            if line is not None:
                return self._pick(line, now_s)
        return None

    def _first_line(self, level: int) -> Line | None:
        keys = self._keys[level]
        while keys:
            service, number, share = keys[0]
            line = self._lines.get((level, share))
            current = self.shares.service(share)
            if line is None or self.shares.is_capped(share):
                heapq.heappop(keys)
                self._listed.discard((level, share))
                if line is not None:
                    self._capped.add((level, share))
            elif current != service:
                heapq.heapreplace(keys, (current, number, share))
            else:
                return line
        return None

    def _pick(self, line: Line, now_s: float) -> Request:
        oldest = line.oldest
        if self._overload_s is not None and now_s - oldest.arrived_s > self._overload_s:
            return line.newest
        return oldest

    def set_aside(self, request: Request) -> None:
        """Leave a request out of the order until `restore`."""
        self._step_out(request)
        self._aside.append(request)

    def restore(self) -> None:
        """Put the requests that were set aside back into the order."""
        version, aside, self._aside = self.version, self._aside, []
        for request in aside:
            self._line_up(request)
        self.version = version  # the same requests as before wait

    def uncap(self, share: int) -> None:
        """Let another request of a key run, as one has left its slot."""
        for level in _LEVELS:
            place = (level, share)
            if place in self._capped:
                self._capped.discard(place)
                line = self._lines.get(place)
                if line is not None:
                    self._list(place, line.oldest.number)
                    self.version += 1

    @property
    def next_promotion_s(self) -> float:
        """The earliest moment at which a request may rise a class; infinity if none can."""
        return min((ages[0][0] for ages in self._ages.values() if ages), default=math.inf)

    def promote(self, now_s: float) -> None:
        """Let requests rise a class if they have waited long behind a higher one."""
        for level in _LEVELS[:0:-1]:
            ages = self._ages[level]
            while ages and ages[0][0] <= now_s:
                due_s, _, num_came, request = heapq.heappop(ages)
                if request.state is not RequestState.WAITING or request.level != level:
                    continue
                if self._came_above(level) > num_came:
                    self._rise(request, due_s)
                else:
                    self._age(request, due_s + self._promote_after_s)

    def _came_above(self, level: int) -> int:
        """Return how many requests ever waited at higher levels."""
        return sum(self._num_came[higher] for higher in _LEVELS if higher > level)

    def _age(self, request: Request, due_s: float) -> None:
        """Look at a request's age again at ``due_s``; a higher class that waits now counts as one that comes."""
        level = request.level
        if level < max(_LEVELS):
            is_behind = any(self._num_at[higher] for higher in _LEVELS if higher > level)
            num_came = self._came_above(level) - is_behind
            heapq.heappush(self._ages[level], (due_s, request.number, num_came, request))

    def _rise(self, request: Request, due_s: float) -> None:
        if not request.is_parked:
            self._step_out(request)
        self._num_at[request.level] -= 1
        request.level += 1
        self._num_at[request.level] += 1
        self._num_came[request.level] += 1
        if not request.is_parked:
            self._line_up(request)
        self._age(request, due_s + self._promote_after_s)

    # --- by adapter ---

    def of_adapter(self, digest: str) -> list[Request]:
        """Return the waiting requests with an adapter, among others or alone, the oldest first."""
        requests = self._by_digest.get(digest, {})
        return [requests[number] for number in sorted(requests)]

    def is_awaited(self, digest: str) -> bool:
        """Tell whether a request waits with this adapter."""
        return digest in self._by_digest

    @property
    def oldest_adding_up(self) -> Request | None:
        """The waiting request with several adapters that arrived first."""
        return self._adding_up[min(self._adding_up)] if self._adding_up else None
