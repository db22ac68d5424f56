"""Chat templates that adapters bring, rendered by child processes: such a template is a stranger's program.

The sandbox keeps it from the gateway's objects, and the process keeps it from the gateway's time and memory. A template
that takes more than its share ends its own request and is refused for a while, so that the children are there for others.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import queue
import select
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import InvalidParameterError, SaturatedError

from loraplex_gateway.text.fair_workers import FairWorkers
from loraplex_gateway.text.template_child import LENGTH

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_gateway.types import ChatPrompt

NUM_CHILDREN: Final = 2
MEMORY_BYTES: Final = 256 * 1024 * 1024
TIME_S: Final = 5.0
START_S: Final = 30.0
"""Seconds that a child may take until its first answer: it imports this package."""
REFUSED_S: Final = 60.0
MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
_ENVIRONMENT: Final = {"MALLOC_ARENA_MAX": "1"}  # nothing of the gateway's, which may have secrets in it
_CHILD: Final = Path(__file__).with_name("template_child.py")


class _ShareTakenError(Exception):
    """A child needed more than its share and has ended."""


class _Child:
    """One process, used by one thread at a time."""

    def __init__(self, memory_bytes: int, time_s: float) -> None:
        self._time_s = time_s
        self._has_answered = False
        command = [sys.executable, "-I", str(_CHILD), str(memory_bytes), str(2 * time_s)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=_ENVIRONMENT, cwd="/"
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: bytes) -> dict[str, Any]:
        give_up_at = time.monotonic() + (self._time_s if self._has_answered else START_S)
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            _write(stdin.fileno(), LENGTH.pack(len(request)) + request, give_up_at)
            (length,) = LENGTH.unpack(_read(stdout.fileno(), LENGTH.size, give_up_at))
            if length > MAX_ANSWER_BYTES:
                raise _ShareTakenError
            answer: dict[str, Any] = json.loads(_read(stdout.fileno(), length, give_up_at))
        except (OSError, _ShareTakenError) as error:
            self.close()
            raise _ShareTakenError from error
        self._has_answered = True
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, and whether its template reads functions."""

    text: str
    reads_tools: bool


class TemplateProcesses:
    """A few child processes, started when they are first needed.

    Args:
        num_children: Renders at once.
        memory_bytes: Memory of a child beyond what it has when it starts.
        time_s: Wall time of one render.

    Attributes:
        workers: Threads that wait for the children; prompts of other templates have threads of their own.
    """

    def __init__(
        self, num_children: int = NUM_CHILDREN, *, memory_bytes: int = MEMORY_BYTES, time_s: float = TIME_S
    ) -> None:
        self._memory_bytes = memory_bytes
        self._time_s = time_s
        self.workers = FairWorkers(max(2, num_children))
        self._places: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        for _ in range(num_children):
            self._places.put(None)
        self._lock = threading.Lock()
        self._running: set[_Child] = set()
        self._is_closed = False
        self._refused_until: dict[str, float] = {}

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the children that run."""
        return tuple(child.pid for child in tuple(self._running))

    def render(
        self,
        digest: str,
        source: str,
        special_tokens: Mapping[str, str],
        prompt: ChatPrompt,
        *,
        field: str = "messages",
    ) -> Rendered:
        """Render a conversation; blocks.

        Args:
            digest: Names the template.
            source: Jinja.
            special_tokens: As the template sees them.
            prompt: The conversation.
            field: What a template that takes more than its share is blamed on: the adapter's messages, or ``chat_template``.

        Raises:
            InvalidParameterError: If the template refuses the conversation, or takes more than its share.
            SaturatedError: If no child is free in time.
        """
        self._check_not_refused(digest, field)
        child = self._take()
        try:
            self._check_not_refused(digest, field)  # it may have been meanwhile
            if child is None:
                child = self._start()
            answer = child.ask(pickle.dumps((digest, source, special_tokens, prompt)))
        except _ShareTakenError as error:
            self._forget(child)
            child = None
            self._refuse(digest)
            raise self._too_much(field) from error
        finally:
            self._places.put(child)
        if "refusal" in answer:
            raise InvalidParameterError(answer["refusal"], field=answer["field"])
        return Rendered(answer["text"], bool(answer["reads_tools"]))

    def close(self) -> None:
        """End all children."""
        self.workers.close()
        with self._lock:
            self._is_closed = True
            children, self._running = self._running, set()
        for child in children:
            child.close()

    def _take(self) -> _Child | None:
        try:
            return self._places.get(timeout=START_S)  # they may be starting
        except queue.Empty:
            raise SaturatedError(
                "other adapters' chat templates take all processes that render them; try again",
                retry_after_s=self._time_s,
            ) from None

    def _start(self) -> _Child:
        with self._lock:
            if self._is_closed:
                raise _ShareTakenError
            child = _Child(self._memory_bytes, self._time_s)
            self._running.add(child)
        return child

    def _forget(self, child: _Child | None) -> None:
        with self._lock:
            if child is not None:
                self._running.discard(child)

    def _check_not_refused(self, digest: str, field: str) -> None:
        if time.monotonic() < self._refused_until.get(digest, 0.0):
            raise self._too_much(field)

    def _refuse(self, digest: str) -> None:
        now = time.monotonic()
        self._refused_until = {name: until for name, until in self._refused_until.items() if until > now}
        self._refused_until[digest] = now + REFUSED_S

    def _too_much(self, field: str) -> InvalidParameterError:
        is_requests = field == "chat_template"
        whose = "this" if is_requests else "the adapter's"
        remedy = "send another" if is_requests else "import the adapter with another template"
        return InvalidParameterError(
            f"{whose} chat template takes more than {self._time_s:g} s or {self._memory_bytes // 2**20} MiB for these "
            f"messages, or did within the last {REFUSED_S:g} s; {remedy}, or send the prompt as text",
            field=field,
        )


class ConfinedTemplate:
    """A template of an adapter, used as a `ChatTemplate`; to be rendered away from the event loop, as it waits for a child.

    Args:
        processes: Render it.
        source: Jinja.
        special_tokens: As the template sees them.
        response_template: As of a `ChatTemplate`.
        field: As of `TemplateProcesses.render`.

    Attributes:
        workers: Threads to render in.
        source: As given.
        response_template: As given.
        reads_tools: Whether it writes out functions itself; known once it has rendered a conversation.
    """

    def __init__(
        self,
        processes: TemplateProcesses,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        response_template: str = "",
        field: str = "messages",
    ) -> None:
        self._processes = processes
        self.workers = processes.workers
        self._field = field
        self._special_tokens = dict(special_tokens)
        named = json.dumps([source, self._special_tokens], sort_keys=True)
        self._digest = hashlib.sha256(named.encode(errors="surrogatepass")).hexdigest()
        self.source = source
        self.response_template = response_template
        self.reads_tools = False

    def chosen_for(self, prompt: ChatPrompt) -> ConfinedTemplate:
        """Return itself: an adapter or a request brings one template."""
        return self

    def render(self, prompt: ChatPrompt) -> str:
        """Return the conversation as text; see `TemplateProcesses.render`."""
        tokens = self._special_tokens
        answer = self._processes.render(self._digest, self.source, tokens, prompt, field=self._field)
        self.reads_tools = answer.reads_tools
        return answer.text


def _wait(descriptor: int, give_up_at: float, *, writes: bool) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT if writes else select.POLLIN)
    left_ms = (give_up_at - time.monotonic()) * 1000
    if left_ms <= 0 or not poll.poll(left_ms):
        raise _ShareTakenError


def _write(descriptor: int, data: bytes, give_up_at: float) -> None:
    rest = memoryview(data)
    while rest:
        _wait(descriptor, give_up_at, writes=True)
        rest = rest[os.write(descriptor, rest[: select.PIPE_BUF]) :]


def _read(descriptor: int, num_bytes: int, give_up_at: float) -> bytes:
    parts: list[Any] = []
    while num_bytes:
        _wait(descriptor, give_up_at, writes=False)
        data = os.read(descriptor, min(num_bytes, 65536))
        if not data:
            raise _ShareTakenError
        parts.append(data)
        num_bytes -= len(data)
    return b"".join(parts)
