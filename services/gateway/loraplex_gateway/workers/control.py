"""A worker's control socket: its metrics for the parent, its load for siblings, and cancellations that reached one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import msgspec
from loraplex_common.log import get_logger

from loraplex_gateway.workers.setup import control_path
from loraplex_gateway.workers.snapshot import Snapshot, snapshot_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

    from prometheus_client import CollectorRegistry

    from loraplex_gateway.workers.setup import WorkerSetup

TIMEOUT_S: Final = 4.0  # less than a scrape may take
LOAD_TIMEOUT_S: Final = 1.0
MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024

_log = get_logger()


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is asked: its metrics, or whether it lives, or for its load, or to end a request.

    Attributes:
        is_pulse: Whether it is asked for a sign of life alone.
        is_load: Whether it is asked how many requests it has.
        tenant: Whose request is to end.
        cancel: The id of a request that is to end; empty for none.
    """

    is_pulse: bool = False
    is_load: bool = False
    tenant: str = ""
    cancel: str = ""


class ControlServer:
    """Answers a worker's parent and its siblings, in place of a server of /metrics.

    Args:
        setup: Says where.
        registry: The worker's metrics.
        waiting: Requests that wait for a place here, by base model.
        num_requests: Returns how many requests run or wait here.
        cancel: Ends a request (tenant, id) of this worker; returns whether there was one.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        registry: CollectorRegistry,
        waiting: Mapping[str, int],
        num_requests: Callable[[], int],
        cancel: Callable[[str, str], Awaitable[bool]],
    ) -> None:
        self._setup = setup
        self._registry = registry
        self._waiting = waiting
        self._num_requests = num_requests
        self._cancel = cancel
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen; returns the port of the parent's /metrics."""
        self._server = await asyncio.start_unix_server(self._answer, self._setup.control)
        return self._setup.metrics_port

    async def stop(self) -> None:
        """Stop listening; safe to call twice."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._setup.control.unlink(missing_ok=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            question = msgspec.msgpack.decode(await reader.read(), type=Question)
            answer: Snapshot | bool | int
            if question.is_pulse:
                answer = True
            elif question.is_load:
                answer = self._num_requests()
            elif question.cancel:
                answer = await self._cancel(question.tenant, question.cancel)
            else:
                answer = snapshot_of(self._registry, self._waiting)
            writer.write(msgspec.msgpack.encode(answer))
            await writer.drain()
        except (OSError, msgspec.MsgspecError) as error:
            _log.warning("a question to this worker was not answered", cause=str(error))
        finally:
            writer.close()


async def ask(path: Path, question: Question, kind: type[Any], *, timeout_s: float = TIMEOUT_S) -> Any:
    """Ask a worker and return its answer.

    Raises:
        OSError: If the worker is gone, or does not answer in time (`TimeoutError`).
    """
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_unix_connection(path, limit=MAX_ANSWER_BYTES)
        try:
            writer.write(msgspec.msgpack.encode(question))
            writer.write_eof()
            answer = await reader.read()
        finally:
            writer.close()
    if not answer:
        raise ConnectionResetError(f"{path.stem} ended before it answered")
    return msgspec.msgpack.decode(answer, type=kind)


async def cancel_at_sibling(setup: WorkerSetup, owner: str, tenant: str, request_id: str) -> bool | None:
    """Have a sibling end a request; returns whether there was one, or None if the owner is no sibling, or is gone."""
    path = control_path(setup.folder, owner)
    if not path.exists():
        return None
    try:
        return bool(await ask(path, Question(tenant=tenant, cancel=request_id), bool))
    except OSError:
        return None


async def load_of_all(setup: WorkerSetup | None, own: Callable[[], int]) -> int:
    """Return how many requests run or wait on this worker and on its siblings; a sibling that hangs is left out.

    Args:
        setup: Says where the siblings are; None for a gateway of one process.
        own: Returns how many this one has.
    """
    paths = [] if setup is None else setup.siblings
    return own() + sum(await asyncio.gather(*[_load_of(path) for path in paths]))


async def _load_of(path: Path) -> int:
    try:
        return int(await ask(path, Question(is_load=True), int, timeout_s=LOAD_TIMEOUT_S))
    except OSError as error:
        _log.debug("a worker does not tell its load", gateway_id=path.stem, cause=str(error))
        return 0
