"""Requests as arrays: what the simulator replays."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pathlib import Path

NO_ADAPTER: Final = -1
NO_CONVERSATION: Final = -1
_STREAM_BITS: Final = 20
_STREAM_STEP: Final = 0x9E3779B1  # odd, so that streams begin at different places


class TraceArrays(Protocol):
    """Requests in order of arrival, one entry of each array per request; ``loraplex_client.workload.Trace`` is one.

    ``arrival_s`` is float64 ``[n]`` and never falls, the others are int32 ``[n]``. Turns of one conversation begin with
    the same tokens.
    """

    @property
    def arrival_s(self) -> NDArray[np.float64]:
        """When each request is sent, in seconds."""
        ...

    @property
    def adapter(self) -> NDArray[np.int32]:
        """Index of the adapter, or ``NO_ADAPTER``."""
        ...

    @property
    def tenant(self) -> NDArray[np.int32]:
        """Index of the tenant that sends the request."""
        ...

    @property
    def prompt_tokens(self) -> NDArray[np.int32]:
        """Length of the prompt."""
        ...

    @property
    def output_tokens(self) -> NDArray[np.int32]:
        """Length of the answer."""
        ...

    @property
    def conversation(self) -> NDArray[np.int32]:
        """Index of the conversation, or ``NO_CONVERSATION``."""
        ...


class TraceError(ValueError):
    """A trace cannot be replayed; the message says what is wrong with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedTrace:
    """`TraceArrays` read from a file, or picked from another trace."""

    arrival_s: NDArray[np.float64]
    adapter: NDArray[np.int32]
    tenant: NDArray[np.int32]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    conversation: NDArray[np.int32]

    def __post_init__(self) -> None:
        for column in fields(self):
            array = getattr(self, column.name)
            if array.shape != self.arrival_s.shape or array.ndim != 1:
                raise TraceError(f"{column.name} has shape {array.shape}, arrival_s {self.arrival_s.shape}")
        if len(self.arrival_s) == 0:
            raise TraceError("a trace without requests")
        if not np.isfinite(self.arrival_s).all() or self.arrival_s[0] < 0 or (np.diff(self.arrival_s) < 0).any():
            raise TraceError("arrivals must be finite, from 0 on and in order")
        if min(self.prompt_tokens.min(), self.output_tokens.min()) < 1:
            raise TraceError("prompts and outputs have at least one token")
        if self.adapter.min() < NO_ADAPTER or self.tenant.min() < 0:
            raise TraceError("adapters begin at -1, tenants at 0")


def select(trace: TraceArrays, which: NDArray[np.bool_] | NDArray[np.intp]) -> SavedTrace:
    """Return some of a trace's requests."""
    return SavedTrace(**{column.name: getattr(trace, column.name)[which] for column in fields(SavedTrace)})


def load_trace(path: Path) -> SavedTrace:
    """Read a trace from an ``.npz`` with the columns of `SavedTrace`.

    Raises:
        TraceError: If it is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as columns:
            return SavedTrace(
                arrival_s=columns["arrival_s"].astype(np.float64),
                **{
                    column.name: columns[column.name].astype(np.int32)
                    for column in fields(SavedTrace)
                    if column.name != "arrival_s"
                },
            )
    except (OSError, KeyError, ValueError) as error:
        raise TraceError(f"{path}: {error}") from error


class TokenStreams:
    """Gives token ids without storing them: a request's prompt and answer are one stretch of one random buffer.

    Requests outside conversations begin at different places of the buffer, so they share nothing. All turns of a
    conversation begin at the same place, so a later prompt holds the earlier answers.
    """

    def __init__(self, trace: TraceArrays, max_model_len: int) -> None:
        size = 1 << _STREAM_BITS
        buffer = np.random.default_rng(0).integers(10, 30000, size, dtype=np.int32)
        self._buffer = np.concatenate([buffer, buffer[:max_model_len]])
        own = np.arange(len(trace.arrival_s), dtype=np.uint64)
        talks = trace.conversation.astype(np.int64)
        streams = np.where(talks == NO_CONVERSATION, 2 * own.astype(np.int64), 2 * talks + 1).astype(np.uint64)
        self._starts = (streams * np.uint64(_STREAM_STEP) % np.uint64(size)).astype(np.int64)
        self._lengths = trace.prompt_tokens

    def prompt(self, index: int) -> NDArray[np.int32]:
        """Return a request's prompt, a view."""
        start = self._starts[index]
        return self._buffer[start : start + self._lengths[index]]

    def tokens(self, indices: NDArray[np.intp], first: NDArray[np.int32], count: int) -> NDArray[np.int32]:
        """Return ``count`` tokens of each request from position ``first`` of its sequence on, int32 ``[n, count]``."""
        begins = self._starts[indices] + first
        drawn: NDArray[np.int32] = self._buffer[begins[:, None] + np.arange(count)]
        return drawn
