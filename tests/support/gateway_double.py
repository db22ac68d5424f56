# ruff: noqa: N802 -- RPC names are CamelCase
"""A scripted gateway and a scripted adapter store, for tests of their clients."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.longrunning import operations_pb2_grpc
from google.longrunning.operations_pb2 import Operation
from google.protobuf.any_pb2 import Any as AnyMessage
from grpc_status import rpc_status
from loraplex.v1 import (
    adapter_pb2,
    adapter_store_pb2,
    adapter_store_pb2_grpc,
    fleet_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
)
from loraplex_common.error_status import to_status
from loraplex_common.errors import LoraplexError

Script = Callable[[gateway_pb2.GenerateRequest], Iterator[gateway_pb2.GenerateResponse]]
DIGEST = "ab" * 32


def started(seed: int = 7) -> gateway_pb2.GenerateResponse:
    return gateway_pb2.GenerateResponse(
        started=gateway_pb2.Started(prompt_tokens=3, engine_id="engine-1", adapter_revision=DIGEST, seed=seed)
    )


def chunk(sequence: int, text: str, *token_ids: int, index: int | None = None) -> gateway_pb2.GenerateResponse:
    """Return a chunk; `index` is its sequence if the chunks before it have a token each."""
    index = sequence if index is None else index
    return gateway_pb2.GenerateResponse(
        chunk=gateway_pb2.Chunk(sequence=sequence, index=index, text=text, token_ids=token_ids)
    )


def finished(output_tokens: int = 2) -> gateway_pb2.GenerateResponse:
    end = gateway_pb2.Finished(
        finish_reason=gateway_pb2.FINISH_REASON_STOP,
        stop_token_id=2,
        usage=gateway_pb2.Usage(prompt_tokens=3, output_tokens=output_tokens),
    )
    end.timings.decode.FromMilliseconds(250)
    return gateway_pb2.GenerateResponse(finished=end)


def hello_world(request: gateway_pb2.GenerateRequest) -> Iterator[gateway_pb2.GenerateResponse]:
    yield started()
    yield chunk(0, "Hello", 11)
    yield chunk(1, " world", 12)
    yield finished()


def fail(context: grpc.ServicerContext, error: LoraplexError) -> Any:
    """End a call as our servers do."""
    context.abort_with_status(rpc_status.to_status(to_status(error)))


class GatewayDouble(gateway_pb2_grpc.GatewayServiceServicer):
    """Plays `script` and records the requests; raises `failures` first, one per call."""

    def __init__(self) -> None:
        self.script: Script = hello_world
        self.failures: list[LoraplexError] = []
        self.requests: list[gateway_pb2.GenerateRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.cancelled = threading.Event()
        self.models = [gateway_pb2.ModelCard(name="base", base_model="base", max_model_len=128)]

    def Generate(
        self, request: gateway_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[gateway_pb2.GenerateResponse]:
        self._record(request, context)
        context.add_callback(self._on_end(context))
        try:
            yield from self.script(request)
        except LoraplexError as error:
            fail(context, error)

    def GenerateOnce(
        self, request: gateway_pb2.GenerateOnceRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.GenerateOnceResponse:
        self._record(request.request, context)
        response = gateway_pb2.GenerateOnceResponse()
        for event in self.script(request.request):
            if event.HasField("chunk"):
                response.text += event.chunk.text
                response.token_ids.extend(event.chunk.token_ids)
            elif event.HasField("started"):
                response.started.CopyFrom(event.started)
            elif event.HasField("finished"):
                response.finished.CopyFrom(event.finished)
        return response

    def Tokenize(
        self, request: gateway_pb2.TokenizeRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.TokenizeResponse:
        text = request.text or "".join(message.content for message in request.messages.messages)
        return gateway_pb2.TokenizeResponse(token_ids=[ord(character) for character in text])

    def Detokenize(
        self, request: gateway_pb2.DetokenizeRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.DetokenizeResponse:
        return gateway_pb2.DetokenizeResponse(text="".join(map(chr, request.token_ids)))

    def CountTokens(
        self, request: gateway_pb2.CountTokensRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.CountTokensResponse:
        return gateway_pb2.CountTokensResponse(num_tokens=len(request.text))

    def GetModel(
        self, request: gateway_pb2.GetModelRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.GetModelResponse:
        return gateway_pb2.GetModelResponse(model=next(card for card in self.models if card.name == request.name))

    def ListModels(
        self, request: gateway_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.ListModelsResponse:
        position = int(request.page_token or 0)  # pages of one
        more = position + 1 < len(self.models)
        return gateway_pb2.ListModelsResponse(
            models=self.models[position : position + 1], next_page_token=str(position + 1) if more else ""
        )

    def CancelRequest(
        self, request: gateway_pb2.CancelRequestRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.CancelRequestResponse:
        return gateway_pb2.CancelRequestResponse(was_running=request.request_id == "running")

    def _record(self, request: gateway_pb2.GenerateRequest, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if self.failures:
            fail(context, self.failures.pop(0))

    def _on_end(self, context: Any) -> Callable[[], None]:
        def on_end() -> None:
            if context.code() is None:  # ended by the caller, not by this double
                self.cancelled.set()

        return on_end


class StoreDouble(adapter_store_pb2_grpc.AdapterStoreServiceServicer, operations_pb2_grpc.OperationsServicer):  # type: ignore[misc]
    """Keeps names in a dict; an import is an Operation that is done when it is read for the third time."""

    def __init__(self) -> None:
        self.adapters: dict[str, adapter_pb2.Adapter] = {}
        self.uploads: dict[str, dict[str, bytes]] = {}
        self.requests: list[Any] = []
        self.import_error: LoraplexError | None = None
        self.warnings: list[str] = []
        self.report = adapter_store_pb2.AdapterReport()
        self._looks = 0

    def UploadAdapter(
        self, request_iterator: Iterator[adapter_store_pb2.UploadAdapterRequest], context: grpc.ServicerContext
    ) -> adapter_store_pb2.UploadAdapterResponse:
        header = next(request_iterator).header
        self.requests.append(header)
        data = b"".join(request.data for request in request_iterator)
        if len(data) < sum(file.num_bytes for file in header.files):  # cancelled, which looks like the end here
            return adapter_store_pb2.UploadAdapterResponse()
        files = {}
        for file in header.files:
            files[file.name], data = data[: file.num_bytes], data[file.num_bytes :]
        self.uploads[header.name] = files
        return adapter_store_pb2.UploadAdapterResponse(
            adapter=self._put(header.name),
            revision=revision(),
            already_existed=files in [kept for name, kept in self.uploads.items() if name != header.name],
            warnings=self.warnings,
        )

    def ImportAdapter(
        self, request: adapter_store_pb2.ImportAdapterRequest, context: grpc.ServicerContext
    ) -> Operation:
        self.requests.append(request)
        self._looks = 0
        return self._operation(request.name)

    def WaitOperation(self, request: Any, context: grpc.ServicerContext) -> Operation:
        self._looks += 1
        return self._operation(request.name)

    def GetAdapter(
        self, request: adapter_store_pb2.GetAdapterRequest, context: grpc.ServicerContext
    ) -> adapter_store_pb2.GetAdapterResponse:
        name = request.name.partition(":")[0].partition("@")[0]
        if name not in self.adapters:
            from loraplex_common.errors import AdapterNotFoundError

            fail(context, AdapterNotFoundError(f"no adapter {name!r}"))
        return adapter_store_pb2.GetAdapterResponse(adapter=self.adapters[name], revision=revision())

    def GetAdapterReport(
        self, request: adapter_store_pb2.GetAdapterReportRequest, context: grpc.ServicerContext
    ) -> adapter_store_pb2.GetAdapterReportResponse:
        self.requests.append(request)
        self.report.name = request.name.partition(":")[0]
        self.report.revision.CopyFrom(revision())
        return adapter_store_pb2.GetAdapterReportResponse(report=self.report)

    def ListAdapters(
        self, request: adapter_store_pb2.AdapterStoreServiceListAdaptersRequest, context: grpc.ServicerContext
    ) -> adapter_store_pb2.AdapterStoreServiceListAdaptersResponse:
        names = [name for name in sorted(self.adapters) if name.startswith(request.name_prefix)]
        position = int(request.page_token or 0)  # pages of one
        page = names[position : position + 1]
        return adapter_store_pb2.AdapterStoreServiceListAdaptersResponse(
            adapters=[self.adapters[name] for name in page],
            next_page_token=str(position + 1) if position + 1 < len(names) else "",
        )

    def ListAdapterRevisions(
        self, request: adapter_store_pb2.ListAdapterRevisionsRequest, context: grpc.ServicerContext
    ) -> adapter_store_pb2.ListAdapterRevisionsResponse:
        return adapter_store_pb2.ListAdapterRevisionsResponse(revisions=[revision()])

    def SetAlias(
        self, request: adapter_store_pb2.SetAliasRequest, context: grpc.ServicerContext
    ) -> adapter_store_pb2.SetAliasResponse:
        self.requests.append(request)
        adapter = self.adapters[request.alias.name]
        adapter.aliases.append(request.alias)
        return adapter_store_pb2.SetAliasResponse(adapter=adapter)

    def DeleteAdapter(
        self, request: adapter_store_pb2.DeleteAdapterRequest, context: grpc.ServicerContext
    ) -> adapter_store_pb2.DeleteAdapterResponse:
        self.requests.append(request)
        adapter = self.adapters.pop(request.name)
        adapter.state = adapter_pb2.Adapter.STATE_DELETED
        return adapter_store_pb2.DeleteAdapterResponse(adapter=adapter)

    def PrefetchAdapter(
        self, request: adapter_store_pb2.PrefetchAdapterRequest, context: grpc.ServicerContext
    ) -> adapter_store_pb2.PrefetchAdapterResponse:
        self.requests.append(request)
        return adapter_store_pb2.PrefetchAdapterResponse()

    def EvictAdapter(
        self, request: adapter_store_pb2.AdapterStoreServiceEvictAdapterRequest, context: grpc.ServicerContext
    ) -> adapter_store_pb2.AdapterStoreServiceEvictAdapterResponse:
        self.requests.append(request)
        return adapter_store_pb2.AdapterStoreServiceEvictAdapterResponse()

    def _put(self, name: str) -> adapter_pb2.Adapter:
        self.adapters[name] = adapter_pb2.Adapter(
            name=name,
            state=adapter_pb2.Adapter.STATE_READY,
            aliases=[adapter_pb2.Alias(name=name, label="latest", revision=DIGEST)],
            latest=revision(),
        )
        return self.adapters[name]

    def _operation(self, name: str) -> Operation:
        operation = Operation(name=name)
        is_done = self._looks >= 2
        operation.metadata.Pack(
            adapter_store_pb2.ImportAdapterMetadata(
                name=name,
                stage=adapter_store_pb2.ImportAdapterMetadata.STAGE_DONE
                if is_done
                else adapter_store_pb2.ImportAdapterMetadata.STAGE_FETCHING,
                bytes_done=50 * self._looks,
                bytes_total=100,
            )
        )
        if is_done:
            operation.done = True
            if self.import_error is not None:
                operation.error.CopyFrom(to_status(self.import_error))
            else:
                result = AnyMessage()
                result.Pack(adapter_store_pb2.ImportAdapterResult(adapter=self._put(name), revision=revision()))
                operation.response.CopyFrom(result)
        return operation


def revision() -> adapter_pb2.AdapterRevision:
    return adapter_pb2.AdapterRevision(
        revision=DIGEST,
        name="json",
        max_rank=8,
        target_modules=["q_proj", "v_proj"],
        canonical_bytes=2048,
        num_layers=2,
        text_parts=adapter_pb2.TextPartsInfo(digest=DIGEST, kinds=["chat_template", "stop_tokens"]),
    )


@contextlib.contextmanager
def serving(
    gateway: GatewayDouble | None = None,
    store: StoreDouble | None = None,
    fleet: fleet_pb2_grpc.FleetServiceServicer | None = None,
) -> Iterator[str]:
    """Serve the doubles on a free port of the loopback; yields ``host:port``."""
    server = grpc.server(ThreadPoolExecutor(8))
    if gateway is not None:
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(gateway, server)
    if fleet is not None:
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(fleet, server)
    if store is not None:
        adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(store, server)
        operations_pb2_grpc.add_OperationsServicer_to_server(store, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()
