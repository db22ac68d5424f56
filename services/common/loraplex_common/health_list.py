"""The messages of ``grpc.health.v1.Health/List``, which older releases of grpcio-health-checking lack.

They are described in a pool of their own, so that nothing clashes where a release has them.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from grpc_health.v1 import health_pb2

# As in grpc-proto's health.proto.
_ADDED: Final = """
message_type { name: "HealthListRequest" }
message_type {
  name: "HealthListResponse"
  field {
    name: "statuses" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".grpc.health.v1.HealthListResponse.StatusesEntry"
  }
  nested_type {
    name: "StatusesEntry"
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field {
      name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".grpc.health.v1.HealthCheckResponse"
    }
    options { map_entry: true }
  }
}
"""


def _messages() -> tuple[Any, Any]:
    """Return the classes of request and response: the library's if it has them."""
    if hasattr(health_pb2, "HealthListRequest"):
        return health_pb2.HealthListRequest, health_pb2.HealthListResponse
    file = descriptor_pb2.FileDescriptorProto.FromString(health_pb2.DESCRIPTOR.serialized_pb)
    file.MergeFrom(text_format.Parse(_ADDED, descriptor_pb2.FileDescriptorProto()))
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    names = (f"{file.package}.{name}" for name in ("HealthListRequest", "HealthListResponse"))
    request, response = (message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names)
    return request, response


HealthListRequest, HealthListResponse = _messages()
