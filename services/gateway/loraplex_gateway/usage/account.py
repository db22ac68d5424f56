"""What one request used on its way over engines; its record is written once the last of them has said its part."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_common.usage_records import UsageRecord


def new_usage_id() -> str:
    """Return an id that no other request has."""
    return secrets.token_hex(8)


class Attempt:
    """One submission of a request to one engine; it is closed once, by what the engine reports or by its loss."""

    def __init__(self, account: UsageAccount) -> None:
        self._account = account
        self._is_open = True

    def reported(self, kv_page_s: float, adapter_page_s: float) -> None:
        """Note what the engine says that it used."""
        if self._is_open:
            self._is_open = False
            self._account.add(kv_page_s, adapter_page_s)

    def lost(self) -> None:
        """Note that the engine will not say."""
        if self._is_open:
            self._is_open = False
            self._account.lack()


class UsageAccount:
    """The account of one call.

    Args:
        usage_id: The id of the request.
        on_closed: Gets the record once the request has ended and all attempts are closed.

    Attributes:
        usage_id: The id of the request; replaced by that of the stream which the request goes on with.
        is_continuing: Whether it goes on with a stream.
        is_resumable: Whether another call may go on with it.
        is_late: Whether the request ended before its last attempt was closed.
    """

    def __init__(self, usage_id: str, on_closed: Callable[[UsageAccount, UsageRecord], None]) -> None:
        self.usage_id = usage_id
        self._on_closed = on_closed
        self.is_continuing = self.is_resumable = self.is_late = False
        self._record: UsageRecord | None = None
        self._num_attempts = self._num_open = self._num_unmetered = 0
        self._kv_page_s = self._adapter_page_s = 0.0

    @property
    def page_seconds(self) -> tuple[float, float] | None:
        """Page-seconds of its sequence and of its adapters, to 1e-6; None as long as an engine may still report."""
        return None if self._num_open else (round(self._kv_page_s, 6), round(self._adapter_page_s, 6))

    @property
    def num_attempts(self) -> int:
        """How often an engine was sent the request."""
        return self._num_attempts

    @property
    def num_unmetered(self) -> int:
        """Attempts whose engine was lost before it said what was used."""
        return self._num_unmetered

    def attempt(self) -> Attempt:
        """Note that an engine is sent the request."""
        self._num_attempts += 1
        self._num_open += 1
        return Attempt(self)

    def add(self, kv_page_s: float, adapter_page_s: float) -> None:
        """Close an attempt with what its engine reports."""
        self._kv_page_s += kv_page_s
        self._adapter_page_s += adapter_page_s
        self._close_one()

    def lack(self) -> None:
        """Close an attempt whose engine was lost."""
        self._num_unmetered += 1
        self._close_one()

    def finish(self, record: UsageRecord) -> None:
        """Note the request's end; ``record`` lacks at most what engines are still to report."""
        self._record = record
        self.is_late = self._num_open > 0
        self._hand_over()

    def give_up(self) -> None:
        """Close all attempts that are open: this process ends."""
        self._num_unmetered += self._num_open
        self._num_open = 0
        self._hand_over()

    def _close_one(self) -> None:
        self._num_open = max(0, self._num_open - 1)
        self._hand_over()

    def _hand_over(self) -> None:
        record = self._record
        if record is None or self._num_open:
            return
        self._record = None  # once
        self._on_closed(self, self._completed(record))

    def _completed(self, record: UsageRecord) -> UsageRecord:
        """Return the record with what the engines have said; mostly that is in it, and a copy takes longer than all else here."""
        kv_page_s, adapter_page_s = round(self._kv_page_s, 6), round(self._adapter_page_s, 6)
        known = (kv_page_s, adapter_page_s, self._num_attempts, self._num_unmetered)
        if (record.kv_page_s, record.adapter_page_s, record.attempts, record.unmetered_attempts) == known:
            return record
        return replace(
            record,
            kv_page_s=kv_page_s,
            adapter_page_s=adapter_page_s,
            attempts=self._num_attempts,
            unmetered_attempts=self._num_unmetered,
        )
