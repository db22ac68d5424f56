"""Imports and deletes adapters for administrators, with the credential of each: the gateway's own has no such right."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.duration_pb2 import Duration
from loraplex.v1 import adapter_pb2, adapter_store_pb2_grpc
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.error_status import from_status
from loraplex_common.errors import (
    AdapterNotFoundError,
    AlreadyExistsError,
    ConflictError,
    DeadlineError,
    InvalidParameterError,
    LoraplexError,
)
from loraplex_common.log import get_logger
from loraplex_common.rpc_errors import error_from_rpc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_common.peers import PeerChannel

# A download and its checks; the import goes on in the store if it takes longer.
IMPORT_TIMEOUT_S: Final = 900.0
LOOK_S: Final = 20
CALL_TIMEOUT_S: Final = 20.0
PAUSE_S: Final = 0.5
# Word for word vLLM's: controllers look for it.
ALREADY_LOADED: Final = (
    "The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to "
    "True."
)
_IDS: Final = uuid.UUID("5d0b7f3c-6c43-4b1e-9c5d-1b1a6a3f7d55")

_log = get_logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSource:
    """Where an adapter's files are: a ``file:`` URI, or a repository of the hub."""

    uri: str = ""
    repo: str = ""
    revision: str = ""
    subfolder: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdminCall:
    """One administrator's call.

    Attributes:
        caller: Name of the administrator.
        authorization: What the call came with, handed on to the store; empty for nothing.
        key: The caller's name for the call: a repeated one is done once. Empty makes each call a new one.
    """

    caller: str
    authorization: str = ""
    key: str = ""

    def request_id(self, step: str) -> str:
        """Return the id of a step's request to the store."""
        return str(uuid.uuid5(_IDS, f"{self.caller}\0{self.key}\0{step}") if self.key else uuid.uuid4())

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What the calls to the store carry."""
        return (("authorization", self.authorization),) if self.authorization else ()


class StoreAdmin:
    """Changes the catalog of adapters.

    Args:
        channel: To the adapter store, without a key of its own; `close` closes it.
    """

    def __init__(self, channel: PeerChannel) -> None:
        self._channel = channel

    @classmethod
    def over(cls, channel: PeerChannel | None) -> StoreAdmin | None:
        """Return the store's administration over a channel; None without one."""
        return None if channel is None else cls(channel)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def load(self, name: str, source: AdapterSource, call: AdminCall, *, base_model: str, in_place: bool) -> str:
        """Import an adapter and return its revision once it is there.

        Args:
            name: The adapter's name.
            source: Where its files are.
            call: The call.
            base_model: The base model that it must be for; empty means what it names itself.
            in_place: Import a new revision of a name that has one; otherwise that is refused.

        Raises:
            InvalidParameterError: If the name has an adapter, or the store refuses the source.
            DeadlineError: If the import takes longer than `IMPORT_TIMEOUT_S`; it goes on.
            LoraplexError: What the store says otherwise.
        """
        etag = "" if in_place else await self._reserve(name, call)
        try:
            with _translated():
                return await self._import(name, source, call, base_model, is_new=not in_place)
        except DeadlineError:
            raise
        except LoraplexError as error:
            if etag:
                await self._give_back(name, etag, call)
            if not in_place and "current_revision" in error.metadata:  # another call's import was stored first
                raise _already_loaded(name) from error
            raise

    async def unload(self, name: str, call: AdminCall) -> None:
        """Delete a name; requests that run with it finish.

        Raises:
            AdapterNotFoundError: If there is none.
            LoraplexError: What the store says otherwise.
        """
        with _translated():
            async with self._channel.use() as channel:
                request = pb.DeleteAdapterRequest(name=name, force=True, request_id=call.request_id("delete"))
                await _store(channel).DeleteAdapter(request, metadata=call.metadata, timeout=CALL_TIMEOUT_S)

    async def _reserve(self, name: str, call: AdminCall) -> str:
        """Take a new name, or one without an adapter; return the etag of a name that this call has made, else nothing."""
        async with self._channel.use() as channel:
            store, request_id = _store(channel), call.request_id("create")
            request = pb.CreateAdapterRequest(adapter=adapter_pb2.Adapter(name=name), request_id=request_id)
            try:
                with _translated():
                    made = await store.CreateAdapter(request, metadata=call.metadata, timeout=CALL_TIMEOUT_S)
                # A repeated call is told how the name is now.
                return str(made.adapter.etag) if made.adapter.state == adapter_pb2.Adapter.STATE_EMPTY else ""
            except AlreadyExistsError:
                with _translated():
                    known = await self._known(store, name, call)
                if known is not None and known.state == adapter_pb2.Adapter.STATE_READY:
                    raise _already_loaded(name) from None
        return ""

    async def _known(self, store: Any, name: str, call: AdminCall) -> adapter_pb2.Adapter | None:
        request = pb.AdapterStoreServiceListAdaptersRequest(name_prefix=name, page_size=1)
        page = await store.ListAdapters(request, metadata=call.metadata, timeout=CALL_TIMEOUT_S)
        return next((adapter for adapter in page.adapters if adapter.name == name), None)

    async def _import(self, name: str, source: AdapterSource, call: AdminCall, base_model: str, *, is_new: bool) -> str:
        request = pb.ImportAdapterRequest(name=name, base_model=base_model, request_id=call.request_id("import"))
        if is_new:
            request.expected_revision = ""  # of several such calls the store takes one
        if source.uri:
            request.uri = source.uri
        else:
            request.hf.CopyFrom(
                pb.HuggingFaceSource(repo=source.repo, revision=source.revision, subfolder=source.subfolder)
            )
        async with self._channel.use() as channel:
            operation = await _store(channel).ImportAdapter(request, metadata=call.metadata, timeout=CALL_TIMEOUT_S)
            operation = await _finished(channel, operation, call)
        if operation.HasField("error"):
            raise from_status(operation.error)
        result = pb.ImportAdapterResult()
        operation.response.Unpack(result)
        return result.revision.revision

    async def _give_back(self, name: str, etag: str, call: AdminCall) -> None:
        """Delete a name that this call has made, after an import that has failed; not if it has changed meanwhile."""
        try:
            with _translated():
                async with self._channel.use() as channel:
                    request = pb.DeleteAdapterRequest(name=name, etag=etag)
                    await _store(channel).DeleteAdapter(request, metadata=call.metadata, timeout=CALL_TIMEOUT_S)
        except (ConflictError, AdapterNotFoundError):
            return  # another call has taken the name
        except LoraplexError as error:
            _log.warning("a name without an adapter is left behind", adapter=name, error=error.message)


def _already_loaded(name: str) -> InvalidParameterError:
    return InvalidParameterError(ALREADY_LOADED.format(name=name), field="name")


def _store(channel: grpc.aio.Channel) -> Any:
    return adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)


async def _finished(
    channel: grpc.aio.Channel, operation: operations_pb2.Operation, call: AdminCall
) -> operations_pb2.Operation:
    """Return an operation once it has ended; a store that is away for a moment is asked again."""
    give_up_at = time.monotonic() + IMPORT_TIMEOUT_S
    request = operations_pb2.WaitOperationRequest(name=operation.name, timeout=Duration(seconds=LOOK_S))
    stub: Any = operations_pb2_grpc.OperationsStub(channel)
    while not operation.done:
        if time.monotonic() > give_up_at:
            raise DeadlineError(
                f"the import has not ended after {IMPORT_TIMEOUT_S:g} s; it goes on as {operation.name}"
            )
        try:
            operation = await stub.WaitOperation(request, metadata=call.metadata, timeout=LOOK_S + CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise
            await asyncio.sleep(PAUSE_S)
    return operation


@contextmanager
def _translated() -> Iterator[None]:
    """Turn a failed call into the error that the store raised."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
