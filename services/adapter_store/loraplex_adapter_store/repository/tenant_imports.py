"""Each tenant's imports: counted before anything is fetched, on all replicas together, and given back if they fail.

An import counts once for each tenant in the adapter's `allowed_tenants`, and for no tenant if that list is empty, as its bytes
do. The count drains continuously (generic cell rate algorithm): of 24 a day one is free again each hour. Valkey holds one
time for each tenant, at which all of its imports will be free; a store that dies during an import gives nothing back, and
what it had counted drains like everything else.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import LoraplexError, TenantQuotaError
from loraplex_common.log import get_logger
from loraplex_common.quota_failure import ExceededLimit
from loraplex_common.quotas_file import QuotasFile

from loraplex_adapter_store.repository import keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

LIMIT: Final = "imports_per_day"
DAY_MS: Final = 24 * 3600 * 1000.0

TAKE: Final = """
-- Counts one import for each tenant, or for none of them.
-- KEYS: imports per tenant.  ARGV: milliseconds that one import takes of each tenant's day (0 or less: none is allowed)
local clock = redis.call('TIME')
local now = clock[1] * 1000 + clock[2] / 1000
local free = {}
for i, key in ipairs(KEYS) do
  local share = tonumber(ARGV[i])
  local before = math.max(now, tonumber(redis.call('GET', key) or '0'))
  -- A thousandth of a millisecond is what the sums of a day's shares may be off.
  if share <= 0 or before + share - now > 86400000.001 then
    return {i - 1, string.format('%.3f', before - now), string.format('%.3f', before + share - now - 86400000)}
  end
  free[i] = before + share
end
for i, key in ipairs(KEYS) do
  redis.call('SET', key, string.format('%.3f', free[i]), 'PX', math.ceil(free[i] - now))
end
return {-1}
"""

GIVE_BACK: Final = """
-- KEYS: imports per tenant.  ARGV: as of the script that counted
local clock = redis.call('TIME')
local now = clock[1] * 1000 + clock[2] / 1000
for i, key in ipairs(KEYS) do
  local free = tonumber(redis.call('GET', key) or '0') - tonumber(ARGV[i])
  if free > now then redis.call('SET', key, string.format('%.3f', free), 'PX', math.ceil(free - now))
  else redis.call('DEL', key) end
end
return 1
"""

_log = get_logger()
LimitOf = Callable[[str], "int | None"]
"""Returns the imports that a tenant may have in a day; None for no limit."""


def imports_per_day(quotas_file: Path | None) -> LimitOf:
    """Return the limits of a quotas file; it is read again when it changes."""
    if quotas_file is None:
        return lambda tenant: None
    file = QuotasFile(quotas_file)
    return lambda tenant: file.current().of(tenant).imports_per_day


class TenantImports:
    """Counts imports.

    Args:
        client: Valkey.
        limit_of: The quotas.
    """

    def __init__(self, client: keys.Client, limit_of: LimitOf) -> None:
        self._client = client
        self._limit_of = limit_of

    @asynccontextmanager
    async def one(self, name: str, tenants: Sequence[str]) -> AsyncIterator[None]:
        """Count an import in the block, which gives it back if it fails.

        Raises:
            LoraplexError: In the cases of `take`.
        """
        counted = await self.take(name, tenants)
        try:
            yield
        except BaseException:
            await asyncio.shield(self.give_back(counted))
            raise

    async def take(self, name: str, tenants: Sequence[str]) -> dict[str, float]:
        """Count an import for all of an adapter's tenants; return what `give_back` takes: the part of its day of each, ms.

        Raises:
            TenantQuotaError: If one of them has no import left; it counts for none of them then.
            StoreUnavailableError: If Valkey cannot be reached.
        """
        limits = {tenant: limit for tenant in tenants if (limit := self._limit_of(tenant)) is not None}
        if not limits:
            return {}
        shares = {tenant: DAY_MS / limit if limit else 0.0 for tenant, limit in limits.items()}
        with keys.translated():
            found = await self._client.eval(TAKE, len(shares), *_keys(shares), *_words(shares))
        if (number := int(found[0])) >= 0:
            tenant = list(limits)[number]
            raise _refusal(tenant, limits[tenant], name, float(found[1]), float(found[2]))
        return shares

    async def give_back(self, counted: dict[str, float]) -> None:
        """Uncount an import; without Valkey it drains by itself."""
        if not counted:
            return
        try:
            with keys.translated():
                await self._client.eval(GIVE_BACK, len(counted), *_keys(counted), *_words(counted))
        except LoraplexError as error:
            _log.warning("an import that failed counts until it drains", tenants=list(counted), error=error.message)


def _keys(shares: dict[str, float]) -> list[str]:
    return [keys.tenant_imports(tenant) for tenant in shares]


def _words(shares: dict[str, float]) -> list[str]:
    return [f"{share:.6f}" for share in shares.values()]


def _refusal(tenant: str, limit: int, name: str, used_ms: float, wait_ms: float) -> TenantQuotaError:
    """Return the error of a tenant without an import left.

    Args:
        tenant: The tenant.
        limit: Its quota.
        name: The adapter.
        used_ms: The part of its day that is used.
        wait_ms: When the next import is free.
    """
    if not limit:
        text, remedy, retry_after_s = (
            "0 imports a day are allowed",
            "a retry does not help: ask for a larger quota",
            None,
        )
    else:
        share_s, retry_after_s = DAY_MS / limit / 1000, max(1.0, math.ceil(wait_ms / 1000))
        text = (
            f"{limit} imports a day are allowed, and {min(limit, round(used_ms / 1000 / share_s, 1)):g} are used; one is free "
            f"again every {_time(share_s)}"
        )
        remedy = f"retry in {_time(retry_after_s)}, or ask for a larger quota"
    return TenantQuotaError(
        f"tenant {tenant!r} is over its quota, {LIMIT}: {text}: {remedy}",
        retry_after_s=retry_after_s,
        metadata={"limit": LIMIT, "quota": str(limit), "tenant": tenant, "adapter": name},
        exceeded=[ExceededLimit(tenant=tenant, limit=LIMIT, value=limit, description=text)],
    )


def _time(seconds: float) -> str:
    hours, rest = divmod(math.ceil(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}h{minutes}m" if hours else f"{minutes}m{left}s" if minutes else f"{left}s"
