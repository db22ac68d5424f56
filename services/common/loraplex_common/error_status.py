"""Errors as `google.rpc.Status`, which is how they travel: in the trailers of a call, or inside a message."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

from loraplex_common.errors import LoraplexError, RemoteError, TenantQuotaError
from loraplex_common.http_status import http_status
from loraplex_common.quota_failure import from_failure, to_failure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.message import Message

DOMAIN = "loraplex"
# gRPC refuses trailers beyond 8 KiB, proxies often beyond 4 KiB of details, and messages quote what the caller sent. The
# message goes out twice: in grpc-message, three bytes for each byte outside of ASCII, and in the status, which is base64.
MAX_STATUS_BYTES: Final = 4096
MAX_MESSAGE_BYTES: Final = 1024
MAX_GRPC_MESSAGE_BYTES: Final = 2048
MAX_VIOLATIONS: Final = 8
MAX_VIOLATION_BYTES: Final = 128
LEFT_OUT: Final = "left_out"
"""Key of the metadata that names, with commas between, entries of which only a part would have fitted."""
_MAX_LEFT_OUT_BYTES: Final = 256
_ANY_BYTES: Final = 64  # type URL, tags and lengths of one more detail


def _subclasses(root: type[LoraplexError]) -> list[type[LoraplexError]]:
    return [cls for child in root.__subclasses__() for cls in (child, *_subclasses(child))]


def _valid(text: str) -> str:
    return text.encode(errors="replace").decode()  # a lone surrogate has no UTF-8


def _clip(text: str, max_bytes: int) -> str:
    data = text.encode(errors="replace")
    return data.decode() if len(data) <= max_bytes else data[: max_bytes - 3].decode(errors="ignore") + "..."


def _clip_message(text: str) -> str:
    """Return as much of a message as `MAX_MESSAGE_BYTES` and, percent-encoded, `MAX_GRPC_MESSAGE_BYTES` leave room for."""
    clipped = _clip(text, MAX_MESSAGE_BYTES)
    data = clipped.encode()
    sizes = itertools.accumulate(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in data)
    room = sum(1 for size in sizes if size <= MAX_GRPC_MESSAGE_BYTES)
    return clipped if room == len(data) else _clip(clipped, room)


def _add_metadata(info: error_details_pb2.ErrorInfo, metadata: Mapping[str, str], max_bytes: int) -> None:
    """Add the entries that fit as a whole, short ones first: a program would take a part for the whole."""
    left_out: list[str] = []
    entries = sorted(
        ((_valid(key), _valid(value)) for key, value in metadata.items()), key=lambda pair: len("".join(pair))
    )
    for key, value in entries:
        info.metadata[key] = value
        if info.ByteSize() > max_bytes - _MAX_LEFT_OUT_BYTES - _ANY_BYTES:
            del info.metadata[key]
            left_out.append(key)
    if left_out:
        info.metadata[LEFT_OUT] = _clip(",".join(left_out), _MAX_LEFT_OUT_BYTES)


def _add(status: status_pb2.Status, detail: Message) -> None:
    status.details.add().Pack(detail)


def _add_violations(
    status: status_pb2.Status, detail: error_details_pb2.BadRequest | error_details_pb2.QuotaFailure
) -> None:
    """Add a detail with the first of its violations that there is room for, if for any."""
    while detail.violations if isinstance(detail, error_details_pb2.QuotaFailure) else detail.field_violations:
        if status.ByteSize() + detail.ByteSize() + _ANY_BYTES <= MAX_STATUS_BYTES:
            _add(status, detail)
            return
        if isinstance(detail, error_details_pb2.QuotaFailure):
            del detail.violations[-1]
        else:
            del detail.field_violations[-1]


def _bad_request(error: LoraplexError) -> error_details_pb2.BadRequest:
    violation = error_details_pb2.BadRequest.FieldViolation
    violations = [
        violation(field=_clip(field, MAX_VIOLATION_BYTES), description=_clip(text, MAX_VIOLATION_BYTES))
        for field, text in error.violations[:MAX_VIOLATIONS]
    ]
    return error_details_pb2.BadRequest(field_violations=violations)


def to_status(error: LoraplexError) -> status_pb2.Status:
    """Return the `google.rpc.Status` of an error, with `ErrorInfo` and what else the error carries.

    It has at most `MAX_STATUS_BYTES`, whatever callers sent: the message is cut, metadata of which only a part would fit is
    left out and named under `LEFT_OUT`, and of violations the first ones stay.
    """
    status = status_pb2.Status(code=error.code.value[0], message=_clip_message(error.message))
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    _add_metadata(info, error.metadata, MAX_STATUS_BYTES - status.ByteSize() - _ANY_BYTES)  # RetryInfo takes the rest
    _add(status, info)
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(max(1, round(error.retry_after_s * 1000)))
        _add(status, error_details_pb2.RetryInfo(retry_delay=delay))
    _add_violations(status, _bad_request(error))
    if isinstance(error, TenantQuotaError):
        _add_violations(status, to_failure(error.exceeded))
    return status


def from_status(status: status_pb2.Status) -> LoraplexError:
    """Rebuild the error that `to_status` encoded; an unknown reason becomes a `RemoteError` with the same code."""
    info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
    quota = error_details_pb2.QuotaFailure()
    retry_after_s: float | None = None
    violations: list[tuple[str, str]] = []
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
        elif detail.Is(bad.DESCRIPTOR):
            detail.Unpack(bad)
            violations = [(violation.field, violation.description) for violation in bad.field_violations]
        elif detail.Is(quota.DESCRIPTOR):
            detail.Unpack(quota)
    code = next((c for c in grpc.StatusCode if c.value[0] == status.code), grpc.StatusCode.UNKNOWN)
    keywords: dict[str, Any] = {
        "retry_after_s": retry_after_s,
        "metadata": dict(info.metadata),
        "violations": violations,
    }
    classes: list[type[LoraplexError]] = [LoraplexError, *_subclasses(LoraplexError)]
    for cls in classes:
        if cls is not RemoteError and cls.reason == info.reason and cls.code == code:
            if cls is TenantQuotaError:
                keywords["exceeded"] = from_failure(quota)
            return cls(status.message, **keywords)
    reason = info.reason or code.name
    return RemoteError(status.message, code=code, reason=reason, http_status=http_status(code), **keywords)
