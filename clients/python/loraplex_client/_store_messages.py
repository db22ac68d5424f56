"""Turns wire messages of the adapter store into `resources` and back; shared by both clients."""

from __future__ import annotations

import hashlib
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from loraplex.v1 import adapter_pb2, adapter_store_pb2
from loraplex_common.adapter_folder import check_present_signed, list_folder
from loraplex_common.directories import adapter_directory_problem
from loraplex_common.error_status import from_status
from loraplex_common.errors import AdapterNotFoundError, InvalidParameterError

from loraplex_client.resources import (
    Adapter,
    AdapterState,
    ImportProgress,
    ImportResult,
    ImportStage,
    LabelMove,
    ProgressCallback,
    Revision,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from google.longrunning.operations_proto_pb2 import Operation
    from google.protobuf.timestamp_pb2 import Timestamp

CHUNK_BYTES: Final = 1 << 20  # 1-2 MiB is fastest; 4 MiB would cross the default message limit
STATES: Final = {
    adapter_pb2.Adapter.STATE_EMPTY: AdapterState.EMPTY,
    adapter_pb2.Adapter.STATE_READY: AdapterState.READY,
    adapter_pb2.Adapter.STATE_DELETED: AdapterState.DELETED,
}
_Metadata = adapter_store_pb2.ImportAdapterMetadata
STAGES: Final[Mapping[int, ImportStage]] = {
    _Metadata.STAGE_UNSPECIFIED: ImportStage.PENDING,
    _Metadata.STAGE_PENDING: ImportStage.PENDING,
    _Metadata.STAGE_FETCHING: ImportStage.FETCHING,
    _Metadata.STAGE_VALIDATING: ImportStage.VALIDATING,
    _Metadata.STAGE_STORING: ImportStage.STORING,
    _Metadata.STAGE_DONE: ImportStage.DONE,
}


def directory_uri(directory: Path) -> str:
    """Return the ``file:`` URI of a directory; a relative one is looked for in the working directory."""
    return directory.absolute().as_uri()


def new_request_id() -> str:
    """Return an id that makes a repeated call harmless."""
    return str(uuid.uuid4())


def revision(message: adapter_pb2.AdapterRevision) -> Revision:
    """Return a revision."""
    return Revision(
        digest=message.revision,
        name=message.name,
        base_fingerprint=message.base_fingerprint,
        max_rank=message.max_rank,
        num_parameters=message.num_parameters,
        canonical_bytes=message.canonical_bytes,
        target_modules=tuple(message.target_modules),
        num_layers=message.num_layers,
        source=message.source,
        create_time=_datetime(message.create_time),
        text_parts=tuple(message.text_parts.kinds),
    )


def adapter(message: adapter_pb2.Adapter, resolved: adapter_pb2.AdapterRevision | None = None) -> Adapter:
    """Return an adapter, with the revision that its name resolved to, if known."""
    return Adapter(
        name=message.name,
        state=STATES[message.state],
        description=message.description,
        allowed_tenants=tuple(message.allowed_tenants),
        aliases={alias.label: alias.revision for alias in message.aliases},
        shares={alias.label: _shares(alias.shares) for alias in message.aliases if alias.shares},
        etag=message.etag,
        create_time=_datetime(message.create_time),
        update_time=_datetime(message.update_time),
        latest=revision(message.latest) if message.HasField("latest") else None,
        counterparts=_counterparts(message.counterparts),
        resolved=revision(resolved) if resolved is not None and resolved.revision else None,
    )


def import_result(
    message: adapter_store_pb2.ImportAdapterResult | adapter_store_pb2.UploadAdapterResponse,
) -> ImportResult:
    """Return what an import brought."""
    return ImportResult(
        adapter=adapter(message.adapter),
        revision=revision(message.revision),
        already_existed=message.already_existed,
        warnings=tuple(message.warnings),
        late_gateways=tuple(message.visibility.late_gateways),
    )


def _counterparts(message: Iterable[adapter_pb2.Counterpart]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for each in message:
        found.setdefault(each.revision, {})[each.base_model] = each.counterpart
    return found


def _shares(message: Iterable[adapter_pb2.AliasShare]) -> dict[str, int]:
    return {share.revision: share.weight for share in message}


def alias(name: str, label: str, revision: str | Mapping[str, int]) -> adapter_pb2.Alias:
    """Return where a label is to point: a revision, or revision -> weight.

    Raises:
        InvalidParameterError: If there are no shares: that would remove the label.
    """
    if isinstance(revision, str):
        return adapter_pb2.Alias(name=name, label=label, revision=revision)
    if not revision:
        raise InvalidParameterError("no shares; an empty revision removes a label", field="revision")
    shares = [adapter_pb2.AliasShare(revision=digest, weight=weight) for digest, weight in revision.items()]
    return adapter_pb2.Alias(name=name, label=label, shares=shares)


def update_request(
    name: str, description: str | None, allowed_tenants: Sequence[str] | None, etag: str
) -> adapter_store_pb2.UpdateAdapterRequest:
    """Return a change of the fields that are not None."""
    request = adapter_store_pb2.UpdateAdapterRequest(request_id=new_request_id())
    request.adapter.name, request.adapter.etag = name, etag
    if description is not None:
        request.adapter.description = description
        request.update_mask.paths.append("description")
    if allowed_tenants is not None:
        request.adapter.allowed_tenants.extend(allowed_tenants)
        request.update_mask.paths.append("allowed_tenants")
    return request


def label_move(message: adapter_store_pb2.AliasMove) -> LabelMove:
    """Return a move of a label."""
    return LabelMove(
        label=message.label,
        left_revision=message.left_revision,
        revision=message.revision,
        cause=message.cause,
        time=_datetime(message.time),
        shares=_shares(message.shares),
    )


def import_request(
    name: str,
    label: str,
    base_model: str,
    credential_ref: str = "",
    *,
    stage: bool = False,
    also_base_models: Sequence[str] = (),
) -> adapter_store_pb2.ImportAdapterRequest:
    """Return an import request that still lacks its source."""
    return adapter_store_pb2.ImportAdapterRequest(
        name=name,
        label=label,
        base_model=base_model,
        credential_ref=credential_ref,
        request_id=new_request_id(),
        stage=stage,
        also_base_models=also_base_models,
    )


def resolved_digest(found: Adapter, name: str) -> str:
    """Return the digest that a name resolved to.

    Raises:
        AdapterNotFoundError: If nothing has been imported under it.
    """
    if found.resolved is None:
        raise AdapterNotFoundError(f"adapter {name!r} has no revision yet: import one first")
    return found.resolved.digest


def report_operation(operation: Operation, progress: ProgressCallback | None) -> ImportResult | None:
    """Report an import's progress; return its result once it is done.

    Raises:
        LoraplexError: If the import failed.
    """
    if progress is not None and operation.HasField("metadata"):
        metadata = _Metadata()
        operation.metadata.Unpack(metadata)
        stage = STAGES.get(metadata.stage, ImportStage.PENDING)
        progress(ImportProgress(stage=stage, bytes_done=metadata.bytes_done, bytes_total=metadata.bytes_total))
    if not operation.done:
        return None
    if operation.HasField("error"):
        raise from_status(operation.error)
    result = adapter_store_pb2.ImportAdapterResult()
    operation.response.Unpack(result)
    return import_result(result)


def upload_header(
    name: str,
    directory: Path,
    *,
    label: str,
    base_model: str,
    stage: bool = False,
    also_base_models: Sequence[str] = (),
) -> adapter_store_pb2.UploadAdapterRequest.Header:
    """Return the header of an upload: the adapter's files, and those of a tokenizer and a signature if it brings any.

    Whether the latter can be served, and are trusted, is the store's to say, so it has to hear of them.

    Raises:
        InvalidParameterError: If there is no such directory, or it cannot be read.
        AdapterIncompatibleError: If it is something else than a PEFT adapter.
        AdapterCorruptUploadError: If it lacks an adapter's files.
    """
    if problem := adapter_directory_problem(directory):
        raise InvalidParameterError(problem, field="directory")
    try:
        names = check_present_signed(list_folder(directory), signature=True)
    except OSError as error:
        raise InvalidParameterError(f"{directory} cannot be read: {error.strerror}", field="directory") from error
    header = adapter_store_pb2.UploadAdapterRequest.Header(
        name=name,
        label=label,
        base_model=base_model,
        request_id=new_request_id(),
        stage=stage,
        also_base_models=also_base_models,
    )
    for file_name in names:
        path = directory / file_name
        try:
            header.files.add(name=file_name, num_bytes=path.stat().st_size, sha256=_sha256(path))
        except OSError as error:
            raise InvalidParameterError(f"{path} cannot be read: {error.strerror}", field="directory") from error
    return header


def upload_messages(
    header: adapter_store_pb2.UploadAdapterRequest.Header, directory: Path, progress: ProgressCallback | None
) -> Iterator[adapter_store_pb2.UploadAdapterRequest]:
    """Yield the messages of an upload: the header, then the files' bytes.

    Raises:
        InvalidParameterError: If a file can no longer be read.
    """
    yield adapter_store_pb2.UploadAdapterRequest(header=header)
    done, total = 0, sum(file.num_bytes for file in header.files)
    for announced in header.files:
        for data in _chunks(directory / announced.name):
            yield adapter_store_pb2.UploadAdapterRequest(data=data)
            done += len(data)
            if progress is not None:
                progress(ImportProgress(stage=ImportStage.FETCHING, bytes_done=done, bytes_total=total))


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                yield data
    except OSError as error:
        raise InvalidParameterError(f"{path} cannot be read: {error.strerror}", field="directory") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _datetime(timestamp: Timestamp) -> datetime | None:
    return timestamp.ToDatetime(tzinfo=UTC) if timestamp.seconds or timestamp.nanos else None
