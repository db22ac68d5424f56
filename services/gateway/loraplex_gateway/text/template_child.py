"""Renders untrusted chat templates, in a process of its own: see `confined_templates`.

A message is 4 bytes of length and the rest. Requests are pickled, as they come from the gateway; answers are JSON, as a
template may have taken this process over.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import struct
import sys
from collections import OrderedDict
from typing import IO, TYPE_CHECKING, Final

from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.text.chat_template import ChatTemplate, ChatTemplateError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_gateway.types import ChatPrompt

LENGTH: Final = struct.Struct(">I")
MAX_COMPILED: Final = 64


class Renderer:
    """Compiled templates, the most recently used ones."""

    def __init__(self) -> None:
        self._compiled: OrderedDict[str, ChatTemplate] = OrderedDict()

    def answer(
        self, digest: str, source: str, special_tokens: Mapping[str, str], prompt: ChatPrompt
    ) -> dict[str, str | bool]:
        """Return ``text`` and ``reads_tools``, or ``refusal`` in the template's words and the ``field`` that it is about."""
        try:
            template = self._compiled.get(digest) or ChatTemplate(source, special_tokens)
            self._compiled[digest] = template
            self._compiled.move_to_end(digest)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return {"text": template.render(prompt), "reads_tools": template.reads_tools}
        except InvalidParameterError as error:
            return {"refusal": error.message, "field": error.field or "messages"}
        except (ChatTemplateError, RecursionError) as error:
            return {"refusal": str(error), "field": "chat_template"}


def _limit_memory(num_bytes: int) -> None:
    """Bound what is taken from here on: the libraries are loaded already."""
    with open("/proc/self/statm") as file:
        num_bytes += int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read(stream: IO[bytes]) -> bytes | None:
    head = stream.read(LENGTH.size)
    return stream.read(*LENGTH.unpack(head)) if len(head) == LENGTH.size else None


def main(memory_bytes: int, time_s: float) -> None:
    """Answer requests until the input ends."""
    _limit_memory(memory_bytes)
    renderer, incoming, outgoing = Renderer(), sys.stdin.buffer, sys.stdout.buffer
    while (request := _read(incoming)) is not None:
        signal.setitimer(signal.ITIMER_REAL, time_s)  # ends this process, if the gateway is not there to do it
        try:
            answer = json.dumps(renderer.answer(*pickle.loads(request))).encode()
        except MemoryError:
            os._exit(77)
        signal.setitimer(signal.ITIMER_REAL, 0)
        outgoing.write(LENGTH.pack(len(answer)) + answer)
        outgoing.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
