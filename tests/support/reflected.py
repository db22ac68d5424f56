"""A client of gRPC reflection, under either of its names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

if TYPE_CHECKING:
    import grpc


async def list_services(channel: grpc.aio.Channel, version: str) -> set[str]:
    """Return the full names of the services that a server lists; ``version`` is ``v1`` or ``v1alpha``."""
    answer = await _ask(channel, version, list_services="")
    return {service.name for service in answer.list_services_response.service}


async def files_of(channel: grpc.aio.Channel, version: str, service: str) -> list[FileDescriptorProto]:
    """Return the files that describe a service: its own and all that it imports, as a tool needs them."""
    first = await _ask(channel, version, file_containing_symbol=service)
    files = {file.name: file for file in _files(first)}
    while missing := {name for file in files.values() for name in file.dependency} - set(files):
        for name in missing:
            files |= {file.name: file for file in _files(await _ask(channel, version, file_by_filename=name))}
    return list(files.values())


def _files(answer: ServerReflectionResponse) -> list[FileDescriptorProto]:
    assert answer.HasField("file_descriptor_response"), answer
    return [FileDescriptorProto.FromString(data) for data in answer.file_descriptor_response.file_descriptor_proto]


async def _ask(channel: grpc.aio.Channel, version: str, **question: str) -> ServerReflectionResponse:
    call: Any = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=ServerReflectionRequest.SerializeToString,
        response_deserializer=ServerReflectionResponse.FromString,
    )()
    await call.write(ServerReflectionRequest(**question))
    await call.done_writing()
    answer = await call.read()
    assert isinstance(answer, ServerReflectionResponse), answer
    return answer
