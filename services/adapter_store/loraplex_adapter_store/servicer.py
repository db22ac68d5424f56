"""AdapterStoreService: each RPC converts the request, calls one method, and converts the result."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import crc32c
import grpc
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common import text_parts_wire
from loraplex_common.auth import current_principal
from loraplex_common.errors import InvalidParameterError
from loraplex_common.ids import DEFAULT_LABEL, AdapterRef, check_adapter_name, check_label

from loraplex_adapter_store import alias_wire, attach_wire, paging, report_wire, wire
from loraplex_adapter_store.attach.session import EngineSession
from loraplex_adapter_store.attach.stream import read_hello, run_session
from loraplex_adapter_store.callers import caller_of
from loraplex_adapter_store.lifecycle import Caller
from loraplex_adapter_store.records import AdapterRecord, Position
from loraplex_adapter_store.servicer_imports import ImportRpcs
from loraplex_adapter_store.watchers import check_watcher_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loraplex.v1.adapter_pb2 import Alias

    from loraplex_adapter_store.aliases import AliasTable
    from loraplex_adapter_store.arrivals import Arrivals
    from loraplex_adapter_store.attach.attached import AttachedEngines
    from loraplex_adapter_store.contents import Contents
    from loraplex_adapter_store.hints import Hints
    from loraplex_adapter_store.lifecycle import Lifecycle
    from loraplex_adapter_store.visibility import Changed

Context = grpc.aio.ServicerContext[Any, Any]


class AdapterStoreServicer(ImportRpcs):
    """The RPCs of the store; without credentials every caller is an administrator."""

    def __init__(
        self,
        *,
        lifecycle: Lifecycle,
        arrivals: Arrivals,
        aliases: AliasTable,
        attached: AttachedEngines,
        hints: Hints,
        contents: Contents,
    ) -> None:
        super().__init__(arrivals, contents.revisions)
        self._store_id = f"store-{uuid.uuid4().hex[:12]}"
        self._lifecycle = lifecycle
        self._aliases = aliases
        self._attached = attached
        self._hints = hints
        self._downloads, self._reports = contents.downloads, contents.reports

    async def CreateAdapter(self, request: pb.CreateAdapterRequest, context: Context) -> pb.CreateAdapterResponse:
        """Reserve a name."""
        caller = caller_of(request)
        name = check_adapter_name(request.adapter.name, field="adapter.name")
        tenants = tuple(request.adapter.allowed_tenants)
        changed = await self._lifecycle.create(name, request.adapter.description, tenants, caller)
        return pb.CreateAdapterResponse(**await self._after(changed))

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.GetAdapterResponse:
        """Describe one adapter."""
        ref = AdapterRef.parse(request.name, field="name")
        record, wanted, latest = await self._lifecycle.get(ref, Caller(current_principal()))
        return pb.GetAdapterResponse(
            adapter=wire.adapter(record, latest), revision=wire.revision(wanted) if wanted is not None else None
        )

    async def GetAdapterReport(
        self, request: pb.GetAdapterReportRequest, context: Context
    ) -> pb.GetAdapterReportResponse:
        """Measure one revision."""
        ref = AdapterRef.parse(request.name, field="name")
        record, wanted, _ = await self._lifecycle.get(ref, Caller(current_principal()))
        report = await self._reports.of(record, wanted)
        # In a thread: the messages of a hundred layers take 12 ms, in which no engine would hear of its images.
        return pb.GetAdapterReportResponse(report=await asyncio.to_thread(report_wire.report, report))

    async def ListAdapters(
        self, request: pb.AdapterStoreServiceListAdaptersRequest, context: Context
    ) -> pb.AdapterStoreServiceListAdaptersResponse:
        """Page through adapters by name."""
        records, following = await self._lifecycle.page(
            page_size=paging.page_size(request.page_size),
            after=paging.decode(request.page_token),
            prefix=request.name_prefix,
            show_deleted=request.show_deleted,
            caller=Caller(current_principal()),
        )
        latest = await self._lifecycle.latest_of(records)
        response = pb.AdapterStoreServiceListAdaptersResponse(next_page_token=paging.encode(following))
        for record in records:
            wire.fill_adapter(response.adapters.add(), record, latest.get(wire.latest_of(record) or ""))
        return response

    async def UpdateAdapter(self, request: pb.UpdateAdapterRequest, context: Context) -> pb.UpdateAdapterResponse:
        """Change the fields named in the mask."""
        caller = caller_of(request)
        change = AdapterRecord(
            name=check_adapter_name(request.adapter.name, field="adapter.name"),
            description=request.adapter.description,
            allowed_tenants=tuple(request.adapter.allowed_tenants),
        )
        fields = tuple(request.update_mask.paths)
        changed = await self._lifecycle.update(change, fields, request.adapter.etag, caller)
        return pb.UpdateAdapterResponse(**await self._after(changed))

    async def DeleteAdapter(self, request: pb.DeleteAdapterRequest, context: Context) -> pb.DeleteAdapterResponse:
        """Delete a name softly."""
        caller = caller_of(request)
        name = check_adapter_name(request.name)
        changed = await self._lifecycle.delete(name, request.etag, caller, force=request.force)
        return pb.DeleteAdapterResponse(**await self._after(changed))

    async def ListAdapterRevisions(
        self, request: pb.ListAdapterRevisionsRequest, context: Context
    ) -> pb.ListAdapterRevisionsResponse:
        """Page through a name's revisions, newest first."""
        size, offset = paging.page_size(request.page_size), paging.decode_offset(request.page_token)
        name = check_adapter_name(request.name)
        revisions, has_more = await self._lifecycle.revisions(
            name, page_size=size, offset=offset, caller=Caller(current_principal())
        )
        return pb.ListAdapterRevisionsResponse(
            revisions=[wire.revision(revision) for revision in revisions],
            next_page_token=paging.encode(str(offset + size)) if has_more else "",
        )

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:
        """Move a label atomically."""
        caller = caller_of(request)
        name = check_adapter_name(request.alias.name, field="alias.name")
        label = check_label(request.alias.label, field="alias.label")
        shares = await self._shares(request.alias, name)
        changed = await self._lifecycle.set_alias(name, label, shares, await self._expected(request, name), caller)
        return pb.SetAliasResponse(**await self._after(changed))

    async def RollBackAlias(self, request: pb.RollBackAliasRequest, context: Context) -> pb.RollBackAliasResponse:
        """Point a label at what it left last."""
        caller = caller_of(request)
        name = check_adapter_name(request.name)
        label = check_label(request.label or DEFAULT_LABEL)
        changed, move = await self._lifecycle.roll_back(name, label, await self._expected(request, name), caller)
        return pb.RollBackAliasResponse(**await self._after(changed), left_revision=move.revision, revision=move.left)

    async def ListAliasMoves(self, request: pb.ListAliasMovesRequest, context: Context) -> pb.ListAliasMovesResponse:
        """Page through where a name's labels have pointed, newest first."""
        size, offset = paging.page_size(request.page_size), paging.decode_offset(request.page_token)
        name = check_adapter_name(request.name)
        label = check_label(request.label) if request.label else ""
        moves, has_more = await self._lifecycle.moves(
            name, label, page_size=size, offset=offset, caller=Caller(current_principal())
        )
        return pb.ListAliasMovesResponse(
            moves=[alias_wire.alias_move(move) for move in moves],
            next_page_token=paging.encode(str(offset + size)) if has_more else "",
        )

    async def PrefetchAdapter(self, request: pb.PrefetchAdapterRequest, context: Context) -> pb.PrefetchAdapterResponse:
        """Take a hint that an adapter will be wanted."""
        wanted_in_ms = request.wanted_in.ToMilliseconds()
        if wanted_in_ms < 0:
            raise InvalidParameterError(f"wanted_in: {wanted_in_ms / 1000:g} s is negative", field="wanted_in")
        digest = await self._revision(request.revision, "revision")
        await self._hints.prefetch(request.engine_id, digest, wanted_in_ms)
        return pb.PrefetchAdapterResponse()

    async def EvictAdapter(
        self, request: pb.AdapterStoreServiceEvictAdapterRequest, context: Context
    ) -> pb.AdapterStoreServiceEvictAdapterResponse:
        """Take a hint that an adapter will not be wanted."""
        await self._hints.evict(request.engine_id, await self._revision(request.revision, "revision"))
        return pb.AdapterStoreServiceEvictAdapterResponse()

    async def WatchAliases(
        self, request: pb.WatchAliasesRequest, context: Context
    ) -> AsyncIterator[pb.WatchAliasesResponse]:
        """Stream the name table and its changes; for gateways, so it shows every tenant's adapters."""
        watcher_id = check_watcher_id(request.watcher_id) if request.watcher_id else ""
        async with (
            self._aliases.watchers.watching(watcher_id),
            aclosing(self._aliases.watch(request.start_sequence, request.start_history_id)) as updates,
        ):
            async for update in updates:
                yield wire.alias_update(update, with_text_parts=request.uses_text_parts)

    async def AcknowledgeAliases(
        self, request: pb.AcknowledgeAliasesRequest, context: Context
    ) -> pb.AcknowledgeAliasesResponse:
        """Note what a watcher has taken in."""
        watcher_id = check_watcher_id(request.watcher_id)
        await self._aliases.watchers.acknowledge(watcher_id, Position(request.history_id, request.sequence))
        return pb.AcknowledgeAliasesResponse()

    async def GetTextParts(self, request: pb.GetTextPartsRequest, context: Context) -> pb.GetTextPartsResponse:
        """Return what a revision brings besides weights."""
        return text_parts_wire.to_message(
            await self._downloads.text_parts(await self._revision(request.revision, "revision"))
        )

    async def DownloadAdapter(
        self, request: pb.DownloadAdapterRequest, context: Context
    ) -> AsyncIterator[pb.DownloadAdapterResponse]:
        """Stream the canonical form from an offset; it is a safetensors file."""
        digest = await self._revision(request.revision, "revision")
        position = request.offset
        async with aclosing(self._downloads.read(digest, request.offset, request.limit)) as parts:
            async for data in parts:
                yield pb.DownloadAdapterResponse(offset=position, data=data, crc32c=crc32c.crc32c(data))
                position += len(data)
        yield pb.DownloadAdapterResponse(offset=position, sha256=digest)

    async def AttachEngine(
        self, request_iterator: AsyncIterator[pb.AttachEngineRequest], context: Context
    ) -> AsyncIterator[pb.AttachEngineResponse]:
        """Serve one engine while its stream is open."""
        hello = await read_hello(request_iterator, attach_wire.hello)
        messages = (attach_wire.from_engine(message) async for message in request_iterator)
        session = run_session(self._attached, hello, messages, owner=current_principal().name)
        async with aclosing(session) as outgoing:
            async for message in outgoing:
                if isinstance(message, EngineSession):
                    welcome = pb.AttachEngineResponse.Welcome(
                        store_id=self._store_id, shared_memory=message.shared_memory
                    )
                    yield pb.AttachEngineResponse(welcome=welcome)
                else:
                    yield attach_wire.to_engine(message)

    async def _shares(self, alias: Alias, name: str) -> dict[str, int]:
        """Return where a label is to point: revision -> weight."""
        if not alias.shares:
            given = alias.revision
            return {await self._revision(given, "alias.revision", name): 1} if given else {}
        alias_wire.check_shares(alias)
        shares = {
            await self._revision(share.revision, "alias.shares.revision", name): share.weight for share in alias.shares
        }
        if len(shares) != len(alias.shares):
            raise InvalidParameterError("a revision comes twice", field="alias.shares")
        return shares

    async def _expected(self, request: pb.SetAliasRequest | pb.RollBackAliasRequest, name: str) -> str | None:
        if not request.HasField("expected_revision"):
            return None
        return await self._revisions.expected(request.expected_revision, field="expected_revision", name=name)

    async def _after(self, changed: Changed) -> dict[str, Any]:
        """Return what the answers to all changes of a name have in common."""
        latest = await self._lifecycle.latest_of([changed.record])
        adapter = wire.adapter(changed.record, latest.get(wire.latest_of(changed.record) or ""))
        return {"adapter": adapter, "visibility": wire.visibility(changed.visibility)}
