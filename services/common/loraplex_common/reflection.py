"""gRPC reflection under both of its names: ``v1``, which tools ask for first, and ``v1alpha``, which older ones know.

The wheel has only v1alpha. The two differ in the package's name and in nothing that is sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection, reflection_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

SERVICES: Final = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")


def enable_reflection(server: grpc.aio.Server, service_names: Iterable[str]) -> None:
    """Serve reflection over some services, health and itself; call it before the server starts.

    Args:
        server: The server.
        service_names: Full names, such as ``loraplex.v1.EngineService``.
    """
    _describe_v1()
    servicer = reflection.aio.ReflectionServicer([*service_names, health.SERVICE_NAME, *SERVICES])
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = [grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method}) for name in SERVICES]
    server.add_generic_rpc_handlers(tuple(handlers))


def _describe_v1() -> None:
    """Make v1 known to the descriptor pool, so that reflection can describe itself."""
    pool = descriptor_pool.Default()
    try:
        pool.FindFileContainingSymbol(SERVICES[0])
    except KeyError:
        alpha = descriptor_pb2.FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
        text = text_format.MessageToString(alpha).replace("v1alpha", "v1")
        file = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
        pool.AddSerializedFile(file.SerializeToString())
