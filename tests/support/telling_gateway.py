"""A gateway that sends known words, breaks off where it is told to, and resumes where its client was."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.gateway_double import GatewayDouble, chunk, finished, started

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex.v1 import gateway_pb2
    from loraplex_common.errors import LoraplexError

WORDS = ("Never", " was", " a", " st\u00f6ry", " of", " more", " woe")


def token(n: int) -> str:
    return f"token-{n}"


class Story(GatewayDouble):
    """A gateway that sends `WORDS`, one token each, and breaks off as told.

    Attributes:
        breaks: What each call does after that many words of its own: raises, or returns without an end. None: goes on.
    """

    def __init__(self, *breaks: tuple[int, LoraplexError | None], has_token: bool = True) -> None:
        super().__init__()
        self.breaks = list(breaks)
        self.script = self.tell
        self.has_token = has_token

    def tell(self, request: gateway_pb2.GenerateRequest) -> Iterator[gateway_pb2.GenerateResponse]:
        num_words, error = self.breaks.pop(0) if self.breaks else (len(WORDS), None)
        start = started()
        start.started.resume_token = token(len(self.requests)) if self.has_token else ""
        first = len(request.resume.token_ids)
        sequence = request.resume.last_sequence + 1 if first else 0
        if num_words >= 0:
            yield start
        for n in range(first, min(first + num_words, len(WORDS))):
            yield chunk(sequence + n - first, WORDS[n], n, index=n)
        if error is not None:
            raise error
        if first + num_words >= len(WORDS):
            yield finished(len(WORDS))
