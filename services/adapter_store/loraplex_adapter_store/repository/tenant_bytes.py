"""Each tenant's bytes of adapters: kept beside the catalog, changed in the same step as its records.

An adapter counts in full for each tenant in its `allowed_tenants`, and for no tenant if that list is empty. Its size is
the canonical bytes of all revisions that its name keeps. So a tenant's sum follows from a list of adapters. It changes
with an import, a new list of tenants, a label that brings a revision back, and a deletion; other tenants' actions do
not change it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import TenantQuotaError
from loraplex_common.quota_failure import ExceededLimit
from loraplex_common.quotas_file import QuotasFile
from loraplex_common.sizes import format_size

from loraplex_adapter_store.repository import keys

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from loraplex_adapter_store.records import AdapterRecord, Revision

TOTAL: Final = ""
"""Field of a tenant's hash with the sum of all other fields; no adapter has an empty name."""
LIMIT: Final = "max_adapter_bytes"

LimitOf = Callable[[str], "int | None"]
"""Returns the bytes of adapters that a tenant may have; None for no limit."""


def unlimited(tenant: str) -> int | None:
    """Return no limit for any tenant."""
    return None


def adapter_bytes(quotas_file: Path | None) -> LimitOf:
    """Return the limits of a quotas file; it is read again when it changes."""
    if quotas_file is None:
        return unlimited
    file = QuotasFile(quotas_file)
    return lambda tenant: file.current().of(tenant).max_adapter_bytes


@dataclass(frozen=True, slots=True)
class TenantShares:
    """The effect of one record's change on tenants.

    Attributes:
        tenants: All tenants concerned; `keys` and `words` have the same order.
        num_bytes: Bytes of the adapter after the change, for each of them: 0 for a tenant that loses it.
        limits: Limit of each of them; None for no limit.
    """

    tenants: tuple[str, ...]
    num_bytes: tuple[int, ...]
    limits: tuple[int | None, ...]

    @classmethod
    def of(
        cls, old: AdapterRecord, new: AdapterRecord, revisions: Collection[Revision], limit_of: LimitOf
    ) -> TenantShares:
        """Return the effect of a change on tenants.

        Args:
            old: Record before the change.
            new: Record after the change.
            revisions: Revisions that `new` keeps.
            limit_of: The quotas.
        """
        tenants = tuple(dict.fromkeys((*new.allowed_tenants, *old.allowed_tenants)))
        sizes = {revision.revision: revision.canonical_bytes for revision in revisions}
        total = sum(sizes.get(digest, 0) for digest in new.revisions)
        return cls(
            tenants,
            tuple(total if tenant in new.allowed_tenants else 0 for tenant in tenants),
            tuple(limit_of(tenant) for tenant in tenants),
        )

    @property
    def keys(self) -> list[str]:
        """Hashes that the change touches."""
        return [keys.tenant_bytes(tenant) for tenant in self.tenants]

    @property
    def words(self) -> list[int]:
        """Bytes and limit (-1 for none) of each tenant."""
        pairs = zip(self.num_bytes, self.limits, strict=True)
        return [word for size, limit in pairs for word in (size, -1 if limit is None else limit)]

    def refusal(self, name: str, number: int, others: int, before: int) -> TenantQuotaError:
        """Return the error that refuses a change.

        Args:
            name: The adapter.
            number: Index, from 0, of the tenant without room.
            others: Bytes of the tenant's other adapters.
            before: Bytes of this adapter before the change.
        """
        tenant, size, limit = self.tenants[number], self.num_bytes[number], self.limits[number] or 0
        text = (
            f"{format_size(limit)} ({limit} bytes) of adapters are allowed; other adapters have {others} bytes, and {name} "
            f"would grow from {before} to {size}"
        )
        return TenantQuotaError(
            f"tenant {tenant!r} is over its quota, {LIMIT}: {text}: delete adapters of this tenant or raise the limit",
            metadata={"limit": LIMIT, "quota": str(limit), "tenant": tenant, "adapter": name},
            exceeded=[ExceededLimit(tenant=tenant, limit=LIMIT, value=limit, description=text)],
        )
