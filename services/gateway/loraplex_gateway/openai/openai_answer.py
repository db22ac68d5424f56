"""OpenAI's own answers, of /v1/completions and /v1/chat/completions; the text of a stream is framed without JSON objects.

All chunks of a choice are the same but for their text and token ids. The first of them is rendered and cut into what
stands around those, and the others are put together from the pieces: rendering each costs as much as all else about it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from loraplex_gateway.openai.answer import data_frame
from loraplex_gateway.openai.errors import error_object, error_response
from loraplex_gateway.openai.render import Renderer
from loraplex_gateway.types import Chunk, Started

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.errors import LoraplexError
    from starlette.responses import Response

    from loraplex_gateway.openai.convert import Plan
    from loraplex_gateway.types import Event

DONE: Final = b"data: [DONE]\n\n"
# A chunk that stands for all. Its text is drawn here: no name that a client sends, and a frame repeats, can be equal to it.
_TEXT: Final = secrets.token_hex(16)
_TOKEN_ID: Final = 8_351_207_946_003_518_277
_SAMPLE: Final = Chunk(sequence=0, index=0, token_ids=(_TOKEN_ID,), text=_TEXT)


@dataclass(frozen=True, slots=True)
class _Frame:
    """What stands before, between and behind a chunk's text and its token ids; no `between` where none are shown."""

    before: bytes
    between: bytes | None
    behind: bytes


class OpenAIAnswer:
    """One answer of /v1/completions or /v1/chat/completions; see `answer.Answer`.

    Args:
        plan: What was asked for.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._renderer = Renderer(plan, request_id=plan.requests[0].request_id)
        self._frames: dict[int, _Frame] = {}

    @property
    def is_stream(self) -> bool:
        """Whether events are sent as they come."""
        return self._plan.is_stream

    @property
    def num_choices(self) -> int:
        """Generations side by side."""
        return len(self._plan.requests)

    def frame(self, choice: int, event: Event) -> bytes:
        """Return the server-sent event that one event of a choice becomes, if there is one."""
        if type(event) is Chunk and self._renderer.is_plain(choice, event):
            return self._plain_frame(choice, event)
        if type(event) is Started:
            self._frames.clear()  # it names the weights, which frames repeat
        body = self._renderer.chunk(choice, event)
        return b"" if body is None else data_frame(body)

    def end(self) -> bytes:
        """Return the counts of all choices, if wanted, and the mark of the end."""
        return (data_frame(self._renderer.usage_chunk()) if self._plan.include_usage else b"") + DONE

    def failure(self, error: LoraplexError) -> bytes:
        """Return an error object and the mark of the end."""
        return data_frame(error_object(error, self._plan.names)) + DONE

    def refusal(self, error: LoraplexError) -> Response:
        """Return the response of a generation that failed before anything was sent."""
        return error_response(error, self._plan.names)

    def whole(self, events: Sequence[Sequence[Event]]) -> bytes:
        """Return the body for the events of every choice."""
        return msgspec.json.encode(self._renderer.whole(events))

    def _plain_frame(self, choice: int, chunk: Chunk) -> bytes:
        frame = self._frames.get(choice) or self._cut(choice)
        text = msgspec.json.encode(chunk.text)
        if frame.between is None:
            return b"%b%b%b" % (frame.before, text, frame.behind)
        return b"%b%b%b%b%b" % (frame.before, text, frame.between, msgspec.json.encode(chunk.token_ids), frame.behind)

    def _cut(self, choice: int) -> _Frame:
        whole = data_frame(self._renderer.chunk(choice, _SAMPLE))
        before, text, rest = whole.partition(msgspec.json.encode(_TEXT))
        assert text, "the renderer left the text out"
        between, ids, behind = rest.partition(msgspec.json.encode([_TOKEN_ID]))
        frame = self._frames[choice] = _Frame(before, between, behind) if ids else _Frame(before, None, rest)
        return frame
