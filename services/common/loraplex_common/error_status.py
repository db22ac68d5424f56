"""Errors as `google.rpc.Status`, which is how they travel: in the trailers of a call, or inside a message."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from loraplex_common.errors import LoraplexError, RemoteError, TenantQuotaError
from loraplex_common.http_status import http_status
from loraplex_common.quota_failure import from_failure, to_failure

DOMAIN = "loraplex"
# gRPC refuses trailers beyond 8 KiB, and messages quote what the caller sent: the message goes out twice, in
# grpc-message (up to three bytes per byte) and in the details.
MAX_MESSAGE_BYTES = 1024
MAX_VIOLATIONS = 8
MAX_VIOLATION_BYTES = 128


def _subclasses(root: type[LoraplexError]) -> list[type[LoraplexError]]:
    return [cls for child in root.__subclasses__() for cls in (child, *_subclasses(child))]


def _clip(text: str, max_bytes: int) -> str:
    data = text.encode(errors="replace")  # a lone surrogate has no UTF-8
    return data.decode() if len(data) <= max_bytes else data[: max_bytes - 3].decode(errors="ignore") + "..."


def to_status(error: LoraplexError) -> status_pb2.Status:
    """Return the `google.rpc.Status` of an error, with `ErrorInfo` and what else the error carries."""
    metadata = {key: value.encode(errors="replace").decode() for key, value in error.metadata.items()}  # as in `_clip`
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)]
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(max(1, round(error.retry_after_s * 1000)))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.violations:
        violation = error_details_pb2.BadRequest.FieldViolation
        violations = [
            violation(field=_clip(field, MAX_VIOLATION_BYTES), description=_clip(text, MAX_VIOLATION_BYTES))
            for field, text in error.violations[:MAX_VIOLATIONS]
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if isinstance(error, TenantQuotaError) and error.exceeded:
        details.append(to_failure(error.exceeded))
    status = status_pb2.Status(code=error.code.value[0], message=_clip(error.message, MAX_MESSAGE_BYTES))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
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
