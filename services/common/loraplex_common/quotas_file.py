"""The file with each tenant's quotas: TOML, read again when it changes; docs/quotas.md describes it."""

from __future__ import annotations

import os
import re
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.log import get_logger
from loraplex_common.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

UNLIMITED: Final = "unlimited"
"""Value that lifts, for one tenant, a limit of ``[default]``."""
CHECK_EVERY_S: Final = 1.0
"""Longest time after a change of the file during which an old limit may still apply, in seconds."""
MAX_VALUE: Final = 2**53
"""Largest limit: above it, Valkey's Lua does not count exactly."""
_BURST_OF: Final = {"requests_burst": "requests_per_minute", "tokens_burst": "tokens_per_minute"}

_log = get_logger()


class QuotasFileError(ValueError):
    """The quotas file cannot be used; the message names file, line and key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantQuota:
    """The quota of one tenant. ``None`` is no limit, 0 allows nothing.

    Attributes:
        requests_per_minute: Rate at which requests become free again.
        requests_burst: Requests that may come at once after a pause; a minute's worth unless the file says otherwise.
        tokens_per_minute: Rate at which tokens, of prompts and of output, become free again.
        tokens_burst: Tokens that may be used at once after a pause.
        max_concurrent_requests: Requests under way at once, waiting ones included, on all gateways together.
        max_adapter_bytes: Canonical bytes of all kept revisions of the adapters that are restricted to the tenant.
        imports_per_day: Imports, uploads, pushes and adapters resolved at request time, of adapters that are restricted to
            the tenant; at once after a day's pause, and one more each time that this part of a day has passed.
    """

    requests_per_minute: int | None = None
    requests_burst: int | None = None
    tokens_per_minute: int | None = None
    tokens_burst: int | None = None
    max_concurrent_requests: int | None = None
    max_adapter_bytes: int | None = None
    imports_per_day: int | None = None

    @property
    def limits_requests(self) -> bool:
        """Whether a gateway has to count the tenant's requests."""
        limits = (self.requests_per_minute, self.tokens_per_minute, self.max_concurrent_requests)
        return any(limit is not None for limit in limits)


KEYS: Final = tuple(each.name for each in fields(TenantQuota))


@dataclass(frozen=True, slots=True)
class Quotas:
    """The content of a quotas file.

    Attributes:
        default: Quota of tenants without a table of their own.
        tenants: Tenant -> its quota, including the values from the default.
    """

    default: TenantQuota = field(default_factory=TenantQuota)
    tenants: Mapping[str, TenantQuota] = field(default_factory=dict)

    def of(self, tenant: str) -> TenantQuota:
        """Return a tenant's quota."""
        return self.tenants.get(tenant, self.default)


class QuotasFile:
    """A quotas file that is read again when it changes.

    Args:
        path: Path of the file. A mounted file may be a link that is replaced: the link is followed at each read.
        clock: Monotonic seconds.

    Raises:
        QuotasFileError: If it cannot be used at the start.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._seen: tuple[int, ...] = ()
        self._check_at = clock() + CHECK_EVERY_S
        self._quotas = self._read()

    def current(self) -> Quotas:
        """Return the file's present content: the same object until it changes; checks at most every `CHECK_EVERY_S`.

        If the file cannot be used, that is logged once, and the old content stays valid.
        """
        if self._clock() < self._check_at:
            return self._quotas
        self._check_at = self._clock() + CHECK_EVERY_S
        try:
            state = self._state()
        except OSError:
            state = ()
        if state != self._seen:
            try:
                self._quotas = self._read()
                _log.info("the quotas file was read again", num_tenants=len(self._quotas.tenants))
            except QuotasFileError as error:
                self._seen = state
                _log.error("the quotas file has changed and cannot be used; the old quotas stay", cause=str(error))
        return self._quotas

    def _read(self) -> Quotas:
        try:
            # The state is read before the text, so a change in between is seen next time.
            self._seen = self._state()
            text = self._path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            cause = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
            raise QuotasFileError(f"{self._path}: {cause}") from error
        return parse_quotas(text, str(self._path))

    def _state(self) -> tuple[int, ...]:
        status = os.stat(self._path)
        return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


def parse_quotas(text: str, where: str) -> Quotas:
    """Return the quotas of a file's text.

    Args:
        text: Content of the file.
        where: Name of the file, for messages.

    Raises:
        QuotasFileError: If it is not TOML, or has an unknown table, key or value.
    """
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise QuotasFileError(f"{where}: it is nested too deeply") from None
    except ValueError as error:  # not TOML, or a number with thousands of digits
        raise QuotasFileError(f"{where}: {error}") from None
    reader = _Reader(text, where)
    for name in tables:
        if name not in ("default", "tenants"):
            raise reader.error((name,), "unknown; the file has the tables [default] and [tenants.NAME]")
    default = reader.quota(tables.get("default", {}), ("default",), {})
    named = tables.get("tenants", {})
    if not isinstance(named, dict):
        raise reader.error(("tenants",), "must be tables [tenants.NAME]")
    inherited = _limits(default)
    return Quotas(default, {name: reader.quota(table, ("tenants", name), inherited) for name, table in named.items()})


class _Reader:
    """Reads tables of one file; its errors name the line."""

    def __init__(self, text: str, where: str) -> None:
        self._lines = text.splitlines()
        self._where = where

    def quota(self, table: Any, path: tuple[str, ...], inherited: Mapping[str, int | None]) -> TenantQuota:
        """Return one table's quota: its own keys override inherited ones; a burst goes with its own rate."""
        if not isinstance(table, dict):
            raise self.error(path, "must be a table")
        unknown = next((key for key in table if key not in KEYS), None)
        if unknown is not None:
            raise self.error((*path, unknown), f"unknown; the keys are {', '.join(KEYS)}")
        own = {key: self._value(value, (*path, key)) for key, value in table.items()}
        without = {burst for burst, rate in _BURST_OF.items() if rate in own}
        values = {**{key: value for key, value in inherited.items() if key not in without}, **own}
        for burst, rate in _BURST_OF.items():
            if burst in own and own[burst] is None:
                raise self.error((*path, burst), f"must be a number; without it {rate} is what may come at once")
            if values.get(burst) is not None and not values.get(rate):
                raise self.error((*path, burst), f"goes with a {rate} above 0")
            if values.get(burst) is None:
                values[burst] = values.get(rate)
            elif values[burst] == 0:
                raise self.error((*path, burst), f"must be at least 1; {rate} = 0 allows nothing")
        return TenantQuota(**values)

    def error(self, path: tuple[str, ...], what: str) -> QuotasFileError:
        """Return the error of a table or key."""
        line = self._line(path)
        return QuotasFileError(f"{self._where}{f':{line}' if line else ''}: {'.'.join(path)}: {what}")

    def _value(self, value: Any, path: tuple[str, ...]) -> int | None:
        if value == UNLIMITED:
            return None
        if path[-1] == "max_adapter_bytes" and isinstance(value, str):
            try:
                value = parse_size(value)
            except ValueError as error:
                raise self.error(path, str(error)) from None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_VALUE:
            size = ', a size such as "512MiB"' if path[-1] == "max_adapter_bytes" else ""
            raise self.error(path, f'is {value!r}; it must be a whole number from 0 on{size} or "{UNLIMITED}"')
        return int(value)

    def _line(self, path: tuple[str, ...]) -> int:
        """Return the line of a key or table; 0 if it is not written in the plain way."""
        *parents, key = path
        headers = ({".".join(path), ".".join(_quoted(path))}, {".".join(parents), ".".join(_quoted(tuple(parents)))})
        current = ""
        for number, line in enumerate(self._lines, start=1):
            stripped = line.strip()
            if header := re.match(r"\[\s*([^\]]+?)\s*\]", stripped):
                current = header[1]
                if current in headers[0]:
                    return number
            elif current in headers[1] and re.match(rf"[\"']?{re.escape(key)}[\"']?\s*=", stripped):
                return number
        return 0


def _quoted(path: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'"{part}"' for part in path)


def _limits(quota: TenantQuota) -> dict[str, int | None]:
    return {key: getattr(quota, key) for key in KEYS}
