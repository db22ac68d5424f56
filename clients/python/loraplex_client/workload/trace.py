"""A trace of requests as arrays, and one request of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike

NO_ADAPTER: Final = -1
NO_CONVERSATION: Final = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRequest:
    """One request.

    Attributes:
        index: Place in its trace; arrivals never fall with it.
        arrival_s: When it is sent, in seconds from the start.
        adapter: Index of the adapter; ``NO_ADAPTER`` for the base model.
        tenant: Index of the tenant that sends it.
        prompt_tokens: Length of the prompt, the shared prefix included.
        output_tokens: Exact length of the answer.
        conversation: Index of the conversation; ``NO_CONVERSATION`` for a request on its own.
        turn: Place in the conversation, from 0.
        prefix_tokens: Leading prompt tokens that are prompt and answer of the turn before.
    """

    index: int
    arrival_s: float
    adapter: int
    tenant: int
    prompt_tokens: int
    output_tokens: int
    conversation: int
    turn: int
    prefix_tokens: int


_DTYPES: Final[dict[str, type[np.generic]]] = {
    "arrival_s": np.float64,
    "adapter": np.int32,
    "tenant": np.int32,
    "prompt_tokens": np.int32,
    "output_tokens": np.int32,
    "conversation": np.int32,
    "turn": np.int32,
    "prefix_tokens": np.int32,
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trace:
    """Requests in order of arrival, one entry of each array per request.

    Attributes:
        arrival_s: float64 ``[n]``, never falling. The other arrays are int32 ``[n]``; see `TraceRequest`.
    """

    arrival_s: NDArray[np.float64]
    adapter: NDArray[np.int32]
    tenant: NDArray[np.int32]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    conversation: NDArray[np.int32]
    turn: NDArray[np.int32]
    prefix_tokens: NDArray[np.int32]

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != self.arrival_s.shape or array.ndim != 1:
                raise ValueError(f"{name} must be {dtype.__name__} of one entry per request")
        if len(self) == 0:
            return
        if self.arrival_s[0] < 0 or (np.diff(self.arrival_s) < 0).any():
            raise ValueError("arrivals must be in order, from 0 on")
        if self.adapter.min() < NO_ADAPTER or self.tenant.min() < 0 or self.output_tokens.min() < 1:
            raise ValueError("adapters begin at -1, tenants at 0, outputs at one token")
        if self.prefix_tokens.min() < 0 or (self.prefix_tokens >= self.prompt_tokens).any():
            raise ValueError("a prompt must be longer than the prefix it shares")

    def __len__(self) -> int:
        return len(self.arrival_s)

    def __getitem__(self, index: int) -> TraceRequest:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        values = {name: getattr(self, name)[index].item() for name in _DTYPES}
        return TraceRequest(index=index % len(self), **values)

    def __iter__(self) -> Iterator[TraceRequest]:
        columns = [getattr(self, name).tolist() for name in _DTYPES]
        for index, values in enumerate(zip(*columns, strict=True)):
            yield TraceRequest(index=index, **dict(zip(_DTYPES, values, strict=True)))

    @classmethod
    def of(
        cls,
        arrival_s: NDArray[np.float64],
        *,
        adapter: ArrayLike = NO_ADAPTER,
        tenant: ArrayLike = 0,
        prompt_tokens: ArrayLike = 256,
        output_tokens: ArrayLike = 128,
        conversation: ArrayLike = NO_CONVERSATION,
        turn: ArrayLike = 0,
        prefix_tokens: ArrayLike = 0,
    ) -> Trace:
        """Return a trace sorted by arrival (stably) from arrays or single values that hold for every request."""
        given = {
            "arrival_s": arrival_s,
            "adapter": adapter,
            "tenant": tenant,
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "conversation": conversation,
            "turn": turn,
            "prefix_tokens": prefix_tokens,
        }
        shape = np.shape(arrival_s)
        order = np.argsort(arrival_s, kind="stable")
        columns = {
            name: np.broadcast_to(np.asarray(given[name]), shape).astype(dtype)[order]
            for name, dtype in _DTYPES.items()
        }
        return cls(**columns)

    @property
    def num_adapters(self) -> int:
        """How many different adapters are asked for."""
        return len(np.unique(self.adapter[self.adapter != NO_ADAPTER]))

    @property
    def max_total_tokens(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return int((self.prompt_tokens + self.output_tokens).max(initial=0))

    def select(self, which: NDArray[np.bool_] | NDArray[np.intp] | slice) -> Trace:
        """Return some of the requests; indices must rise."""
        return replace(self, **{name: getattr(self, name)[which] for name in _DTYPES})

    def without_adapters(self) -> Trace:
        """Return the same trace asked of the base model."""
        return replace(self, adapter=np.full(len(self), NO_ADAPTER, dtype=np.int32))

    def sped_up(self, factor: float) -> Trace:
        """Return the same requests at ``factor`` times the rate."""
        return replace(self, arrival_s=self.arrival_s / factor)

    def sha256(self) -> str:
        """Return the digest of the lines ``i,t,a,p,o`` (t with 6 decimals), as the baselines state it."""
        columns = zip(self.arrival_s, self.adapter, self.prompt_tokens, self.output_tokens, strict=True)
        lines = "\n".join(f"{i},{t:.6f},{a},{p},{o}" for i, (t, a, p, o) in enumerate(columns))
        return hashlib.sha256(lines.encode()).hexdigest()


assert tuple(_DTYPES) == tuple(field.name for field in fields(Trace))


def merge(*traces: Trace, separate_tenants: bool = False) -> Trace:
    """Return the union of traces, in order of arrival.

    Args:
        traces: Their conversations are kept apart; adapters with the same index are the same adapter.
        separate_tenants: Give every trace tenants of its own, those of the first trace coming first.
    """
    columns: dict[str, list[NDArray[np.generic]]] = {name: [] for name in _DTYPES}
    conversations = tenants = 0
    for trace in traces:
        for name in _DTYPES:
            columns[name].append(getattr(trace, name))
        is_one = trace.conversation != NO_CONVERSATION
        columns["conversation"][-1] = np.where(is_one, trace.conversation + conversations, NO_CONVERSATION)
        conversations += int(trace.conversation.max(initial=-1)) + 1
        if separate_tenants:
            columns["tenant"][-1] = trace.tenant + tenants
            tenants += int(trace.tenant.max(initial=-1)) + 1
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Trace.of(joined.pop("arrival_s").astype(np.float64), **joined)
