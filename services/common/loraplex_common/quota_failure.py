"""The limits that a refusal names, as `google.rpc.QuotaFailure` on the wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from google.rpc import error_details_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

# A status must stay small; names of tenants are at most 128 characters.
MAX_DESCRIPTION: Final = 256
MAX_TENANT: Final = 128
_SUBJECT: Final = "tenant:"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExceededLimit:
    """A limit of a tenant's quota that does not leave enough.

    Attributes:
        tenant: Tenant with the quota.
        limit: Key of the quotas file, e.g. ``tokens_per_minute``.
        value: Value of the limit.
        description: The amounts used and asked for, for people to read.
    """

    tenant: str
    limit: str
    value: int
    description: str


def to_failure(exceeded: Sequence[ExceededLimit]) -> error_details_pb2.QuotaFailure:
    """Return the detail that names limits: one violation for each, with the subject ``tenant:NAME``."""
    violation = error_details_pb2.QuotaFailure.Violation
    return error_details_pb2.QuotaFailure(
        violations=[
            violation(
                subject=_SUBJECT + limit.tenant[:MAX_TENANT],
                description=limit.description[:MAX_DESCRIPTION],
                quota_metric=limit.limit,
                quota_value=limit.value,
            )
            for limit in exceeded
        ]
    )


def from_failure(failure: error_details_pb2.QuotaFailure) -> tuple[ExceededLimit, ...]:
    """Return the limits that `to_failure` named."""
    return tuple(
        ExceededLimit(
            tenant=violation.subject.removeprefix(_SUBJECT),
            limit=violation.quota_metric,
            value=violation.quota_value,
            description=violation.description,
        )
        for violation in failure.violations
    )
