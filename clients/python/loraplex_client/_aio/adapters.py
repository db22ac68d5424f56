"""Adapter management, for asyncio."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from google.longrunning import operations_pb2_grpc
from google.longrunning.operations_proto_pb2 import Operation, WaitOperationRequest
from loraplex.v1 import adapter_pb2, adapter_store_pb2

from loraplex_client import _push_messages as push_messages
from loraplex_client import _store_messages as messages
from loraplex_client._aio.labels import AsyncLabels
from loraplex_client._aio.sent_streams import send
from loraplex_client._aio.waiting import in_thread
from loraplex_client._errors import translated
from loraplex_client._report_messages import report as report_of
from loraplex_client._requests import duration

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from loraplex_client._push_messages import Config
    from loraplex_client.report import AdapterReport
    from loraplex_client.resources import Adapter, ImportResult, ProgressCallback, PushResult, Revision

WAIT_S: Final = 0.5  # longest silence between two reports of an import's progress


class AsyncAdapters(AsyncLabels):
    """The adapters of one store. Names are ``name``, ``name:label`` or ``name@revision`` where one is looked up."""

    async def import_hub(
        self,
        name: str,
        repo: str,
        *,
        revision: str,
        subfolder: str = "",
        label: str = "",
        base_model: str = "",
        also_base_models: Sequence[str] = (),
        stage: bool = False,
        credential_ref: str = "",
        progress: ProgressCallback | None = None,
    ) -> ImportResult:
        """Let the store fetch an adapter from the Hugging Face hub; return when it is stored.

        Args:
            name: Name to import under.
            repo: ``org/name``.
            revision: Commit, 40 hex digits: a branch would move.
            subfolder: Folder inside the repository.
            label: Label to move to the new revision besides ``latest``.
            base_model: Base to check against; overrides what the checkpoint names.
            also_base_models: Further bases that it may serve on; it is checked against each, and has a revision for each.
            stage: Leave ``latest`` where it is; the revision is used by its digest or by ``label``.
            credential_ref: Name of a credential that the store knows.
            progress: Told how far it has come.

        Raises:
            LoraplexError: If the checkpoint cannot be had or cannot be served.
        """
        source = adapter_store_pb2.HuggingFaceSource(repo=repo, revision=revision, subfolder=subfolder)
        request = messages.import_request(
            name, label, base_model, credential_ref, stage=stage, also_base_models=also_base_models
        )
        request.hf.CopyFrom(source)
        return await self._import(request, progress)

    async def import_directory(
        self,
        name: str,
        directory: Path,
        *,
        label: str = "",
        base_model: str = "",
        also_base_models: Sequence[str] = (),
        stage: bool = False,
        progress: ProgressCallback | None = None,
    ) -> ImportResult:
        """Let the store read a directory on its own machine, below one of its import roots; as `import_hub`."""
        request = messages.import_request(name, label, base_model, stage=stage, also_base_models=also_base_models)
        request.uri = messages.directory_uri(directory)
        return await self._import(request, progress)

    async def import_uri(
        self,
        name: str,
        uri: str,
        *,
        label: str = "",
        base_model: str = "",
        also_base_models: Sequence[str] = (),
        stage: bool = False,
        credential_ref: str = "",
        progress: ProgressCallback | None = None,
    ) -> ImportResult:
        """Let the store fetch an adapter from object storage or a registry; as `import_hub`.

        ``uri`` is ``s3://bucket/folder`` or ``oci://registry/repository@sha256:...``; the store's operator allows them.
        """
        request = messages.import_request(
            name, label, base_model, credential_ref, stage=stage, also_base_models=also_base_models
        )
        request.uri = uri
        return await self._import(request, progress)

    async def upload(
        self,
        name: str,
        directory: Path,
        *,
        label: str = "",
        base_model: str = "",
        also_base_models: Sequence[str] = (),
        stage: bool = False,
        progress: ProgressCallback | None = None,
    ) -> ImportResult:
        """Send a PEFT directory of this machine to the store; return when it is stored. As `import_hub`."""
        header = await in_thread(
            messages.upload_header,
            name,
            directory,
            label=label,
            base_model=base_model,
            stage=stage,
            also_base_models=also_base_models,
        )
        make_messages = partial(messages.upload_messages, header, directory, progress)
        response = await send(self._stub.UploadAdapter, make_messages, self._connection)
        return messages.import_result(response)

    async def push(
        self,
        name: str,
        state_dict: Mapping[str, Any],
        config: Config,
        *,
        label: str = "",
        expected: str | None = None,
        stage: bool = False,
        ready_timeout_s: float | None = None,
        base_model: str = "",
    ) -> PushResult:
        """Send an adapter that this process has in memory; return when its labels have moved.

        They move at one moment, once each engine that holds the revision which they leave holds the new one. Requests that
        run finish with the revision that they began with. A push that fails, or whose process dies, leaves nothing behind.

        Args:
            name: Name to store it under.
            state_dict: Name -> tensor, of torch (also on a device) or numpy, in fp32, fp16 or bf16; names as in
                ``adapter_model.safetensors``, e.g. from ``peft.get_peft_model_state_dict``. Gather a distributed one before.
            config: PEFT's ``LoraConfig`` or what it writes to ``adapter_config.json``.
            label: Label to move to the new revision besides ``latest``.
            expected: If given, the label (``latest`` if none is) must point at this revision (empty: must not exist), so
                that of several pushes after one revision one is stored.
            stage: Leave ``latest`` where it is; the revision is used by its digest or by ``label``.
            ready_timeout_s: How long the labels wait for engines, at most 120 s; 10 s by default.
            base_model: Base to check against; overrides what the config names.

        Raises:
            ConflictError: If the label points elsewhere.
            LoraplexError: If the adapter cannot be served.
        """
        push = push_messages.push_of(
            name,
            state_dict,
            config,
            label=label,
            expected=expected,
            stage=stage,
            ready_timeout_s=ready_timeout_s,
            base_model=base_model,
        )
        response = await send(self._stub.PushAdapter, push.messages, self._connection)
        return push_messages.push_result(response)

    async def list(self, *, prefix: str = "", show_deleted: bool = False) -> AsyncIterator[Adapter]:
        """Yield adapters by name, fetching page after page."""
        request = adapter_store_pb2.AdapterStoreServiceListAdaptersRequest(
            name_prefix=prefix, show_deleted=show_deleted
        )
        while True:
            with translated(self._connection.target):
                page = await self._stub.ListAdapters(request, metadata=self._metadata)
            for message in page.adapters:
                yield messages.adapter(message)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def get(self, name: str) -> Adapter:
        """Return an adapter and the revision that the name resolves to."""
        request = adapter_store_pb2.GetAdapterRequest(name=name)
        with translated(self._connection.target):
            response = await self._stub.GetAdapter(request, metadata=self._metadata)
        return messages.adapter(response.adapter, response.revision)

    async def report(self, name: str) -> AdapterReport:
        """Return what the revision that a name resolves to is made of: each module's parts and norms, bytes, import notes.

        Raises:
            AdapterNotFoundError: If there is no such adapter, or nothing has been imported under the name.
        """
        request = adapter_store_pb2.GetAdapterReportRequest(name=name)
        with translated(self._connection.target):
            response = await self._stub.GetAdapterReport(request, metadata=self._metadata)
        return report_of(response.report)

    async def revisions(self, name: str) -> AsyncIterator[Revision]:
        """Yield the revisions of a name, newest first."""
        request = adapter_store_pb2.ListAdapterRevisionsRequest(name=name)
        while True:
            with translated(self._connection.target):
                page = await self._stub.ListAdapterRevisions(request, metadata=self._metadata)
            for message in page.revisions:
                yield messages.revision(message)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def create(self, name: str, *, description: str = "", allowed_tenants: Sequence[str] = ()) -> Adapter:
        """Reserve a name; nothing can be asked of it before an import.

        Args:
            name: The name.
            description: For people.
            allowed_tenants: Tenants that may use the adapter; empty means all.

        Raises:
            AlreadyExistsError: If the name is in use.
        """
        request = adapter_store_pb2.CreateAdapterRequest(
            adapter=adapter_pb2.Adapter(name=name, description=description, allowed_tenants=allowed_tenants),
            request_id=messages.new_request_id(),
        )
        with translated(self._connection.target):
            response = await self._stub.CreateAdapter(request, metadata=self._metadata)
        return messages.adapter(response.adapter)

    async def update(
        self,
        name: str,
        *,
        description: str | None = None,
        allowed_tenants: Sequence[str] | None = None,
        etag: str = "",
    ) -> Adapter:
        """Change what is not None; ``etag``, if given, must be the adapter's."""
        request = messages.update_request(name, description, allowed_tenants, etag)
        with translated(self._connection.target):
            response = await self._stub.UpdateAdapter(request, metadata=self._metadata)
        return messages.adapter(response.adapter)

    async def delete(self, name: str, *, force: bool = False, etag: str = "") -> Adapter:
        """Soft-delete a name; refused while running requests use it, unless forced (they finish all the same)."""
        request = adapter_store_pb2.DeleteAdapterRequest(
            name=name, force=force, etag=etag, request_id=messages.new_request_id()
        )
        with translated(self._connection.target):
            response = await self._stub.DeleteAdapter(request, metadata=self._metadata)
        return messages.adapter(response.adapter)

    async def prefetch(self, name: str, *, engine_id: str = "", wanted_in_s: float | None = None) -> None:
        """Hint that an adapter will be wanted; the store picks the engine if none is named."""
        request = adapter_store_pb2.PrefetchAdapterRequest(
            revision=await self._resolve(name),
            engine_id=engine_id,
            wanted_in=None if wanted_in_s is None else duration(wanted_in_s),
        )
        with translated(self._connection.target):
            await self._stub.PrefetchAdapter(request, metadata=self._metadata)

    async def evict(self, name: str, *, engine_id: str = "") -> None:
        """Hint that an adapter will not be wanted, on one engine or on all."""
        request = adapter_store_pb2.AdapterStoreServiceEvictAdapterRequest(
            revision=await self._resolve(name), engine_id=engine_id
        )
        with translated(self._connection.target):
            await self._stub.EvictAdapter(request, metadata=self._metadata)

    async def _resolve(self, name: str) -> str:
        return messages.resolved_digest(await self.get(name), name)

    async def _import(
        self, request: adapter_store_pb2.ImportAdapterRequest, progress: ProgressCallback | None
    ) -> ImportResult:
        operations = operations_pb2_grpc.OperationsStub(self._channel)
        with translated(self._connection.target):
            operation: Operation = await self._stub.ImportAdapter(request, metadata=self._metadata)
            while (result := messages.report_operation(operation, progress)) is None:
                wait = WaitOperationRequest(name=operation.name, timeout=duration(WAIT_S))
                operation = await operations.WaitOperation(wait, metadata=self._metadata)
        return result
