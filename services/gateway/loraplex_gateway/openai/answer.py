"""What an HTTP API makes of a generation: bytes of each event of a stream, or of the whole at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.errors import LoraplexError
    from starlette.responses import Response

    from loraplex_gateway.types import Event, Started


class Answer(Protocol):
    """Writes one answer of an API; what `GenerationResponse` needs to know of it.

    A stream is the `frame` of each event, then `end`, or `failure` in its place. An answer that is no stream is `whole`,
    and one that fails before its first byte is a `refusal`.
    """

    @property
    def is_stream(self) -> bool:
        """Whether events are sent as they come."""
        ...

    @property
    def num_choices(self) -> int:
        """Generations side by side; `choice` counts them from 0."""
        ...

    def frame(self, choice: int, event: Event) -> bytes:
        """Return the server-sent events that one event of a choice becomes; nothing where the API has none for it."""
        ...

    def end(self) -> bytes:
        """Return what ends a stream whose choices have all finished."""
        ...

    def failure(self, error: LoraplexError) -> bytes:
        """Return what ends a stream that has begun and failed."""
        ...

    def refusal(self, error: LoraplexError) -> Response:
        """Return the response of a generation that failed before anything was sent."""
        ...

    def whole(self, events: Sequence[Sequence[Event]]) -> bytes:
        """Return the JSON body for the events of every choice."""
        ...


def data_frame(body: Any) -> bytes:
    """Return a server-sent event without a name whose data is a JSON value."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def system_fingerprint(started: Started) -> str | None:
    """Return what says which weights answer: the adapter's revision, several ones in their order; None for the base model."""
    return "+".join(started.adapter_revisions) or started.adapter_revision or None
