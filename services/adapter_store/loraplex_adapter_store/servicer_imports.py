"""The RPCs that bring adapters in: imports, uploads, pushes."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import grpc
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex.v1 import adapter_store_pb2_grpc
from loraplex_common.auth import current_principal
from loraplex_common.errors import InvalidParameterError, LoraplexError
from loraplex_common.ids import DEFAULT_LABEL, check_adapter_name, check_label

from loraplex_adapter_store import wire
from loraplex_adapter_store.callers import caller_of
from loraplex_adapter_store.imports.hub import HubSource
from loraplex_adapter_store.imports.targets import ImportTarget
from loraplex_adapter_store.imports.uploads import AnnouncedFile, linger
from loraplex_adapter_store.push import push_wire

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from google.longrunning import operations_pb2

    from loraplex_adapter_store.arrivals import Arrivals
    from loraplex_adapter_store.revisions import RevisionFinder

MAX_TENANT: Final = 256
Context = grpc.aio.ServicerContext[Any, Any]


class ImportRpcs(adapter_store_pb2_grpc.AdapterStoreServiceServicer):
    """A part of `AdapterStoreServicer`."""

    def __init__(self, arrivals: Arrivals, revisions: RevisionFinder) -> None:
        self._intake, self._pusher, self._resolver = arrivals.intake, arrivals.pusher, arrivals.resolver
        self._revisions = revisions

    async def ImportAdapter(self, request: pb.ImportAdapterRequest, context: Context) -> operations_pb2.Operation:
        """Start an import from a directory or the hub."""
        target = await self._target(request)
        source: str | HubSource
        match request.WhichOneof("source"):
            case "uri":
                source = request.uri
            case "hf":
                hub = request.hf
                source = HubSource(repo=hub.repo, revision=hub.revision, subfolder=hub.subfolder)
            case _:
                raise InvalidParameterError("no source is set", field="source")
        return await self._intake.start(source, target, credential=request.credential_ref)

    async def ResolveAdapter(self, request: pb.ResolveAdapterRequest, context: Context) -> pb.ResolveAdapterResponse:
        """Return the adapter that a source is for a tenant."""
        if not 0 < len(request.tenant) <= MAX_TENANT:
            raise InvalidParameterError(f"not of 1 to {MAX_TENANT} characters", field="tenant")
        resolved = await self._resolver.resolve(request.source, request.tenant)
        return pb.ResolveAdapterResponse(
            name=resolved.name, source=resolved.source, revision=resolved.revision, is_new=resolved.is_new
        )

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[pb.UploadAdapterRequest], context: Context
    ) -> pb.UploadAdapterResponse:
        """Import the files in the stream."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidParameterError("the first message must be a header", field="header")
        target = await self._target(first.header)
        files = tuple(
            AnnouncedFile(name=file.name, num_bytes=file.num_bytes, sha256=file.sha256) for file in first.header.files
        )
        async with aclosing(_parts_of(request_iterator)) as parts:
            try:
                outcome = wire.import_result(await self._intake.upload(files, parts, target))
            except LoraplexError:
                await linger(parts)
                raise
        return pb.UploadAdapterResponse(
            adapter=outcome.adapter,
            revision=outcome.revision,
            already_existed=outcome.already_existed,
            warnings=outcome.warnings,
            visibility=outcome.visibility,
        )

    async def PushAdapter(
        self, request_iterator: AsyncIterator[pb.PushAdapterRequest], context: Context
    ) -> pb.PushAdapterResponse:
        """Import the tensors in the stream; labels move once engines have them."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidParameterError("the first message must be a header", field="header")
        header = first.header
        async with aclosing(push_wire.parts(request_iterator)) as parts:
            try:
                timeout_s = push_wire.ready_timeout_s(header)
                target = replace(await self._target(header), kind="push", expected_label=header.label or DEFAULT_LABEL)
                outcome = await self._pusher.push(push_wire.adapter(header), parts, target, timeout_s)
            except LoraplexError:
                await linger(parts)
                raise
        return push_wire.response(outcome)

    async def _revision(self, text: str, field: str, name: str = "") -> str:
        return await self._revisions.find(text, current_principal(), field=field, name=name)

    async def _target(
        self, request: pb.ImportAdapterRequest | pb.UploadAdapterRequest.Header | pb.PushAdapterRequest.Header
    ) -> ImportTarget:
        caller, expected = caller_of(request), None
        if request.stage and request.label == DEFAULT_LABEL:
            raise InvalidParameterError(f"a staged import leaves {DEFAULT_LABEL!r} where it is", field="label")
        name = check_adapter_name(request.name)
        if request.HasField("expected_revision"):
            expected = await self._revisions.expected(request.expected_revision, field="expected_revision", name=name)
        return ImportTarget(
            name=name,
            label=check_label(request.label) if request.label else "",
            base_model=request.base_model,
            request_id=caller.request_id,
            content=caller.content,
            is_staged=request.stage,
            expected=expected,
        )


async def _parts_of(messages: AsyncIterator[pb.UploadAdapterRequest]) -> AsyncGenerator[bytes, None]:
    async for message in messages:
        if message.WhichOneof("part") != "data":
            raise InvalidParameterError("a second header", field="header")
        yield message.data
