"""Imports as long-running operations (AIP-151).

The replica that runs an import is the authority on it; a copy in Valkey lets every replica answer. The copy of a
running operation lasts `RUNNING_TTL_S` unless it is renewed. So an operation whose replica died is NOT_FOUND soon
after, and the import must be repeated. Finished operations are kept for a day. The record is the wire's own
`Operation`, so it needs no conversion.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import grpc
from google.longrunning import operations_pb2
from google.rpc import code_pb2
from loraplex_common.answer_by import answering_within
from loraplex_common.error_status import to_status
from loraplex_common.errors import CancelledRequestError, InvalidParameterError, LoraplexError
from loraplex_common.housekeeping import Trouble
from loraplex_common.log import get_logger
from loraplex_common.tasks import cancel_and_wait

from loraplex_adapter_store import wire
from loraplex_adapter_store.imports.progress import Progress
from loraplex_adapter_store.imports.targets import ImportOutcome
from loraplex_adapter_store.repository import keys, scripts

if TYPE_CHECKING:
    from loraplex_adapter_store.answers import Answer

_log = get_logger()
RUNNING_TTL_S: Final = 5
"""Short: until it is over, a repeated import waits for a replica that has died."""
HEARTBEAT_S: Final = 1.0
FINISHED_TTL_S: Final = 24 * 3600
POLL_S: Final = 0.1
MAX_LISTED: Final = 1000
PASSING: Final = frozenset({code_pb2.UNAVAILABLE, code_pb2.RESOURCE_EXHAUSTED})
"""Failures after which the same call is to be made again, with the same request_id."""
PREFIX: Final = "operations/"

Report = Callable[[Progress], None]
Work = Callable[[Report], Awaitable[ImportOutcome]]
"""Imports, reporting its progress as it goes, and returns the outcome."""


class OperationNotFoundError(LoraplexError):
    """There is no such operation."""

    code, reason, http_status = grpc.StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND", 404


@dataclass(slots=True)
class _Running:
    operation: operations_pb2.Operation
    task: asyncio.Task[None] | None = None
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    is_dirty: bool = False


class LongRunning:
    """Runs operations and answers questions about them."""

    def __init__(self, client: keys.Client) -> None:
        self._client = client
        self._running: dict[str, _Running] = {}
        self._is_closing = False

    async def start(
        self, operation_id: str, progress: Progress, work: Work, *, asked: Answer
    ) -> operations_pb2.Operation:
        """Start an import under an id, or return the operation that already has it; one that may be repeated starts again.

        Raises:
            AlreadyExistsError: If that operation does something else than this request asks for.
            StoreUnavailableError: If Valkey cannot be reached; nothing has started then.
        """
        running = _Running(operations_pb2.Operation(name=PREFIX + operation_id))
        running.operation.metadata.Pack(wire.import_metadata(progress))
        with keys.translated():
            used: bytes | None = await self._client.set(
                keys.operation_use(operation_id), asked.to_json(), nx=True, get=True, ex=FINISHED_TTL_S
            )
            if used is not None:
                asked.repeated(used)
            if operation_id in self._running:  # while Valkey was away, its copy may have ended
                return await self.get(operation_id)
            is_new = await self._client.set(
                keys.operation(operation_id), running.operation.SerializeToString(), nx=True, ex=RUNNING_TTL_S
            )
            if not is_new and not await self._starts_again(operation_id, running):
                return await self.get(operation_id)
            await self._client.zadd(keys.OPERATIONS, {operation_id: time.time()})
        self._running[operation_id] = running
        with answering_within(None):  # the operation goes on after this call
            running.task = asyncio.create_task(self._run(operation_id, running, work), name=f"operation {operation_id}")
        return _copy(running.operation)

    async def _starts_again(self, operation_id: str, running: _Running) -> bool:
        """Take the place of an operation that failed by what may have passed; False if it did not, or another call has."""
        key = keys.operation(operation_id)
        found = await self._client.get(key) or b""
        if operations_pb2.Operation.FromString(found).error.code not in PASSING:
            return False
        begun = running.operation.SerializeToString()
        return bool(await self._client.eval(scripts.START_AGAIN, 1, key, found, begun, RUNNING_TTL_S))

    async def get(self, operation_id: str) -> operations_pb2.Operation:
        """Return an operation in its present state.

        Raises:
            OperationNotFoundError: If it never existed, is too old, or died with its replica.
        """
        if (running := self._running.get(operation_id)) is not None:
            return _copy(running.operation)
        with keys.translated():
            data = await self._client.get(keys.operation(operation_id))
        if data is None:
            raise OperationNotFoundError(
                f"operation {operation_id} does not exist; if it was running, its replica has died: repeat the import"
            )
        return operations_pb2.Operation.FromString(data)

    async def wait(self, operation_id: str, timeout_s: float | None) -> operations_pb2.Operation:
        """Return an operation once it has finished, or its present state when the time is over."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            operation = await self.get(operation_id)
            left = None if deadline is None else deadline - time.monotonic()
            if operation.done or (left is not None and left <= 0):
                return operation
            running = self._running.get(operation_id)
            try:
                if running is not None:
                    async with asyncio.timeout(left):
                        await running.finished.wait()
                else:
                    await asyncio.sleep(POLL_S if left is None else min(POLL_S, left))  # it runs on another replica
            except TimeoutError:
                continue

    async def cancel(self, operation_id: str) -> None:
        """Ask an operation to stop; nothing happens if it has finished."""
        if (running := self._running.get(operation_id)) is not None:
            if running.task is not None:
                running.task.cancel()
            return
        if not (await self.get(operation_id)).done:
            with keys.translated():
                await self._client.set(keys.cancelled(operation_id), b"1", ex=RUNNING_TTL_S)

    async def delete(self, operation_id: str) -> None:
        """Forget a finished operation.

        Raises:
            InvalidParameterError: If the operation still runs.
        """
        if not (await self.get(operation_id)).done:
            raise InvalidParameterError(f"operation {operation_id} still runs: cancel it first", field="name")
        with keys.translated():
            await self._client.delete(keys.operation(operation_id), keys.operation_use(operation_id))
            await self._client.zrem(keys.OPERATIONS, operation_id)

    async def page(self, *, page_size: int, after: str) -> tuple[list[operations_pb2.Operation], str]:
        """Return a page of operations by id, and the id at which to go on; empty on the last page."""
        with keys.translated():
            expired = time.time() - FINISHED_TTL_S - RUNNING_TTL_S
            await self._client.zremrangebyscore(keys.OPERATIONS, 0, expired)
            ids = sorted(raw.decode() for raw in await self._client.zrange(keys.OPERATIONS, 0, -1))
            page = [operation_id for operation_id in ids if operation_id > after][: page_size + 1]
            found = await self._client.mget([keys.operation(i) for i in page[:page_size]]) if page else []
        operations = [operations_pb2.Operation.FromString(data) for data in found if data]
        return operations, page[page_size - 1] if len(page) > page_size else ""

    async def newest(self, *, since: float, num_most: int) -> list[operations_pb2.Operation]:
        """Return the operations that began since a time (seconds since the epoch), the newest first, and of these so many."""
        with keys.translated():
            ids = await self._client.zrange(
                keys.OPERATIONS, "+inf", since, desc=True, byscore=True, offset=0, num=num_most
            )
            found = await self._client.mget([keys.operation(raw.decode()) for raw in ids]) if ids else []
        return [operations_pb2.Operation.FromString(data) for data in found if data]

    async def close(self) -> None:
        """Cancel the operations that run."""
        self._is_closing = True
        await cancel_and_wait(*(running.task for running in self._running.values() if running.task is not None))

    async def _run(self, operation_id: str, running: _Running, work: Work) -> None:
        def report(progress: Progress) -> None:
            running.operation.metadata.Pack(wire.import_metadata(progress))
            running.is_dirty = True

        heartbeat = asyncio.create_task(self._renew(operation_id, running), name=f"renew {operation_id}")
        try:
            running.operation.response.Pack(wire.import_result(await work(report)))
        except LoraplexError as error:
            running.operation.error.CopyFrom(to_status(error))
        except asyncio.CancelledError:
            if running.task is not None:
                running.task.uncancel()  # noted; the rest is to be done in any case
            running.operation.error.CopyFrom(to_status(CancelledRequestError("the import was cancelled")))
        except Exception as error:
            _log.error("import failed unexpectedly", operation=operation_id, exc_info=error)
            running.operation.error.CopyFrom(to_status(LoraplexError(f"internal error in operation {operation_id}")))
        running.operation.done = True
        await cancel_and_wait(heartbeat)
        await self._finish(operation_id, running)

    async def _finish(self, operation_id: str, running: _Running) -> None:
        running.finished.set()
        trouble = Trouble()
        while True:  # until Valkey has it, this replica answers from memory
            try:
                await self._save(operation_id, running, FINISHED_TTL_S)
                break
            except LoraplexError as error:
                trouble.warn("an operation's end is not saved yet", operation=operation_id, error=error.message)
                if self._is_closing:
                    break
                await asyncio.sleep(HEARTBEAT_S)
        del self._running[operation_id]

    async def _renew(self, operation_id: str, running: _Running) -> None:
        """Keep the copy in Valkey fresh, and check there whether the operation is to be cancelled."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                await self._save(operation_id, running, RUNNING_TTL_S)
                with keys.translated():
                    is_cancelled = await self._client.exists(keys.cancelled(operation_id))
            except LoraplexError:
                continue  # the import itself will notice
            if is_cancelled and running.task is not None:
                running.task.cancel()

    async def _save(self, operation_id: str, running: _Running, ttl_s: int) -> None:
        with keys.translated():
            await self._client.set(keys.operation(operation_id), running.operation.SerializeToString(), ex=ttl_s)


def _copy(operation: operations_pb2.Operation) -> operations_pb2.Operation:
    result = operations_pb2.Operation()
    result.CopyFrom(operation)
    return result
