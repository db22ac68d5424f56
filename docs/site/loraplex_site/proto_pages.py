"""The reference of the gRPC contract, a page for each proto, from the comments in the protos."""

from __future__ import annotations

import tempfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

from loraplex_site.repository import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

_PACKAGE: Final = ".loraplex.v1."
# Numbers of the fields of descriptor.proto that a location's path is made of.
_MESSAGE, _ENUM, _SERVICE = 4, 5, 6
_NESTED, _NESTED_ENUM, _FIELD, _VALUE, _METHOD = 3, 4, 2, 2, 2


def read_protos() -> list[FileDescriptorProto]:
    """Return the contract's files with their comments.

    Raises:
        ValueError: If protoc refuses the protos.
    """
    proto = ROOT / "proto"
    sources = sorted(str(path.relative_to(proto)) for path in (proto / "loraplex").rglob("*.proto"))
    includes = [f"-I{folder}" for folder in (proto, proto / "third_party", resources.files("grpc_tools") / "_proto")]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "protos.binpb"
        if protoc.main(["protoc", *includes, f"--descriptor_set_out={out}", "--include_source_info", *sources]):
            raise ValueError(f"protoc refuses {', '.join(sources)}")
        return list(FileDescriptorSet.FromString(out.read_bytes()).file)


def page_of(file: FileDescriptorProto) -> str:
    """Return the page of one proto: its services, then its messages, then its enums."""
    comments = {
        tuple(location.path): _text(location.leading_comments or location.trailing_comments)
        for location in file.source_code_info.location
    }
    head = next((text for path, text in comments.items() if path == (12,) and text), "")  # 12: the line `syntax`
    lines = [f"# {Path(file.name).name}", head, f"Package `{file.package}`, `proto/{file.name}`."]
    for index, service in enumerate(file.service):
        lines += _service(service, (_SERVICE, index), comments)
    for index, message in enumerate(file.message_type):
        lines += _message(message, (_MESSAGE, index), comments, prefix="")
    for index, enum in enumerate(file.enum_type):
        lines += _enum(enum, (_ENUM, index), comments, prefix="")
    return "\n\n".join(line for line in lines if line) + "\n"


def _service(
    service: ServiceDescriptorProto, path: tuple[int, ...], comments: dict[tuple[int, ...], str]
) -> Iterator[str]:
    yield f"## {service.name}"
    yield comments.get(path, "")
    for index, method in enumerate(service.method):
        asked = ("stream " if method.client_streaming else "") + _short(method.input_type)
        answered = ("stream " if method.server_streaming else "") + _short(method.output_type)
        yield f"### {service.name}.{method.name}"
        yield f"`{method.name}({asked}) returns ({answered})`"
        yield comments.get((*path, _METHOD, index), "")


def _message(
    message: DescriptorProto, path: tuple[int, ...], comments: dict[tuple[int, ...], str], *, prefix: str
) -> Iterator[str]:
    name = prefix + message.name
    yield f"## {name}"
    yield comments.get(path, "")
    if message.field:
        rows = [
            _row(
                str(field.number), f"`{field.name}`", f"`{_type(field, message)}`", comments.get((*path, _FIELD, i), "")
            )
            for i, field in enumerate(message.field)
        ]
        yield "\n".join(["| number | field | type | meaning |", "| --- | --- | --- | --- |", *rows])
    for index, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from _message(nested, (*path, _NESTED, index), comments, prefix=f"{name}.")
    for index, enum in enumerate(message.enum_type):
        yield from _enum(enum, (*path, _NESTED_ENUM, index), comments, prefix=f"{name}.")


def _enum(
    enum: EnumDescriptorProto, path: tuple[int, ...], comments: dict[tuple[int, ...], str], *, prefix: str
) -> Iterator[str]:
    yield f"## {prefix}{enum.name}"
    yield comments.get(path, "")
    rows = [
        _row(str(value.number), f"`{value.name}`", comments.get((*path, _VALUE, index), ""))
        for index, value in enumerate(enum.value)
    ]
    yield "\n".join(["| number | value | meaning |", "| --- | --- | --- |", *rows])


def _type(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    """Return a field's type as a proto has it, with the name of the oneof that it is in."""
    name = _short(field.type_name) or FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    entry = next(
        (n for n in message.nested_type if n.options.map_entry and field.type_name.endswith(f".{n.name}")), None
    )
    if entry is not None:
        key, value = (_type(part, entry) for part in entry.field)
        return f"map<{key}, {value}>"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    if field.proto3_optional:
        return f"optional {name}"
    if field.HasField("oneof_index"):
        return f"{name}, one of {message.oneof_decl[field.oneof_index].name}"
    return name


def _short(name: str) -> str:
    return name.removeprefix(_PACKAGE).removeprefix(".")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") or "-" for cell in cells) + " |"


def _text(comment: str) -> str:
    """Return a comment as Markdown that shows what its author typed."""
    return "\n".join(line.strip() for line in comment.strip().splitlines()).replace("<", "&lt;")
