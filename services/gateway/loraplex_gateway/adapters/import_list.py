"""The adapter store's newest imports, for operators: asked with the gateway's own credential, which may list them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.timestamp_pb2 import Timestamp
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.error_status import from_status
from loraplex_common.rpc_errors import error_from_rpc

if TYPE_CHECKING:
    from loraplex_common.peers import PeerChannel

SHOWN_S: Final = 3600.0
MAX_SHOWN: Final = 50
TIMEOUT_S: Final = 5.0


async def newest_imports(store: PeerChannel) -> list[dict[str, Any]]:
    """Return the imports that began within `SHOWN_S`, the newest first and at most `MAX_SHOWN`, as JSON has them.

    Raises:
        LoraplexError: If the store refuses or does not answer.
    """
    since = Timestamp()
    since.FromSeconds(int(time.time() - SHOWN_S))
    request = operations_pb2.ListOperationsRequest(
        filter=f'create_time >= "{since.ToJsonString()}"', page_size=MAX_SHOWN
    )
    try:
        async with store.use() as channel:
            stub: Any = operations_pb2_grpc.OperationsStub(channel)
            listed = await stub.ListOperations(request, timeout=TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    return [_shown(operation) for operation in listed.operations]


def _shown(operation: operations_pb2.Operation) -> dict[str, Any]:
    metadata = pb.ImportAdapterMetadata()
    operation.metadata.Unpack(metadata)
    stage = pb.ImportAdapterMetadata.Stage.Name(metadata.stage).removeprefix("STAGE_").lower()
    return {
        "operation": operation.name,
        "name": metadata.name,
        "stage": "done" if operation.done else stage,
        "bytes_done": metadata.bytes_done,
        "bytes_total": metadata.bytes_total,
        "created_at": metadata.create_time.ToNanoseconds() * 1e-9,
        "error": from_status(operation.error).message if operation.HasField("error") else "",
    }
