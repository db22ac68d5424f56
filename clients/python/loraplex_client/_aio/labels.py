"""Labels of adapters, for asyncio."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc

from loraplex_client import _store_messages as messages
from loraplex_client._errors import translated
from loraplex_client.resources import RollBack

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    import grpc

    from loraplex_client._connection import Connection
    from loraplex_client.resources import Adapter, LabelMove


class AsyncLabels:
    """Where the labels of one store's adapters point, and have pointed; a part of `AsyncAdapters`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._metadata = connection.metadata
        self._opened: grpc.aio.Channel | None = None

    @property
    def _channel(self) -> grpc.aio.Channel:
        if self._opened is None:
            self._opened = self._connection.open_aio()
        return self._opened

    @cached_property
    def _stub(self) -> adapter_store_pb2_grpc.AdapterStoreServiceAsyncStub:
        return adapter_store_pb2_grpc.AdapterStoreServiceStub(self._channel)

    async def moves(self, name: str, *, label: str = "") -> AsyncIterator[LabelMove]:
        """Yield where the labels of a name, or one of them, have pointed, newest first."""
        request = adapter_store_pb2.ListAliasMovesRequest(name=name, label=label)
        while True:
            with translated(self._connection.target):
                page = await self._stub.ListAliasMoves(request, metadata=self._metadata)
            for message in page.moves:
                yield messages.label_move(message)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def roll_back(self, name: str, *, label: str = "", expected_revision: str | None = None) -> RollBack:
        """Point a label (``latest`` by default) at what it left last, atomically; twice in a row leaves it where it was.

        Raises:
            AdapterNotFoundError: If it has left no revision that is still kept.
            ConflictError: If it does not point at ``expected_revision``.
        """
        request = adapter_store_pb2.RollBackAliasRequest(
            name=name, label=label, expected_revision=expected_revision, request_id=messages.new_request_id()
        )
        with translated(self._connection.target):
            response = await self._stub.RollBackAlias(request, metadata=self._metadata)
        return RollBack(
            adapter=messages.adapter(response.adapter),
            left_revision=response.left_revision,
            revision=response.revision,
        )

    async def alias(
        self,
        name: str,
        label: str,
        revision: str | Mapping[str, int],
        *,
        expected_revision: str | None = None,
    ) -> Adapter:
        """Point ``name:label`` at a revision, atomically; an empty revision removes the label.

        Args:
            name: The adapter's name.
            label: The label, e.g. ``prod``.
            revision: Digest, or its first 8 digits or more; or several of them with a weight each, which split the
                label's requests: those with equal affinity keys get the same revision.
            expected_revision: If given, the label must point here now (empty: must not exist).

        Raises:
            ConflictError: If it points elsewhere.
        """
        request = adapter_store_pb2.SetAliasRequest(
            alias=messages.alias(name, label, revision),
            expected_revision=expected_revision,
            request_id=messages.new_request_id(),
        )
        with translated(self._connection.target):
            response = await self._stub.SetAlias(request, metadata=self._metadata)
        return messages.adapter(response.adapter)

    async def close(self) -> None:
        """Close the connection."""
        if self._opened is not None:
            await self._opened.close()
