"""The ledger: what each request used, in a capped stream in Valkey that all gateways write to.

Records gather here and are written a few times a second, in one round trip. While Valkey is away they wait, as many as fit
`MAX_PENDING`; beyond that the oldest are dropped and counted. The log has every one of them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import msgspec
from loraplex_common.errors import LoraplexError
from loraplex_common.housekeeping import keep_doing
from loraplex_common.log import get_logger
from loraplex_common.usage_records import USAGE_KEY, UsageRecord

from loraplex_gateway.usage.account import UsageAccount, new_usage_id
from loraplex_gateway.usage.script import WRITE

if TYPE_CHECKING:
    from collections.abc import Callable

    from redis.asyncio import Redis

    from loraplex_gateway.config import GatewayConfig
    from loraplex_gateway.metrics.gateway import GatewayMetrics

GATHER_S: Final = 0.25
MAX_BATCH: Final = 256
MAX_PENDING: Final = 20_000
WRITE_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 2.0
RETRY_PAUSE_S: Final = 2.0
MARK_S: Final = 60
"""How long a record is known to be written, so that a write whose answer was lost is not repeated."""

_log = get_logger()


@dataclass(frozen=True, slots=True)
class _Pending:
    text: bytes
    mark: str
    call_id: str
    began_at: str
    kept_s: int


_encode: Final = msgspec.json.Encoder().encode  # in a sixth of json's time


def encoded(record: UsageRecord) -> bytes:
    """Return a record as it lies in the stream: JSON; what no UTF-8 can hold of a caller's text is replaced."""
    try:
        return _encode(record)
    except UnicodeEncodeError:
        values = asdict(record)
        texts = {name: value for name, value in values.items() if isinstance(value, str)}
        sound = {name: text.encode(errors="replace").decode() for name, text in texts.items()}
        return _encode(values | sound)


class UsageLedger:
    """Keeps accounts of running requests and writes the records of those that ended.

    Args:
        valkey: Client.
        max_records: About how many records the stream keeps; 0 writes none.
        resume_window_s: How long after its start a stream may be resumed.
        on_record: Told of each record: counts it for Prometheus.
        on_drop: Called for each record that is dropped.

    Attributes:
        num_pending: Records that have yet to be written.
    """

    def __init__(
        self,
        valkey: Redis,
        *,
        max_records: int,
        resume_window_s: float,
        on_record: Callable[[UsageRecord], None] = lambda _: None,
        on_drop: Callable[[], None] = lambda: None,
    ) -> None:
        self._valkey = valkey
        self._max_records = max_records
        self._resume_window_s = resume_window_s
        self._on_record, self._on_drop = on_record, on_drop
        self._pending: deque[_Pending] = deque()
        self._late: set[UsageAccount] = set()
        self._has_work = asyncio.Event()

    @property
    def num_pending(self) -> int:
        """Records that have yet to be written."""
        return len(self._pending)

    @classmethod
    def of(cls, config: GatewayConfig, valkey: Redis, metrics: GatewayMetrics) -> UsageLedger:
        """Return the ledger that a gateway's configuration asks for."""
        return cls(
            valkey,
            max_records=config.usage_records,
            resume_window_s=config.resume_window_s,
            on_record=metrics.usage.add,
            on_drop=metrics.usage.num_dropped.inc,
        )

    def open(self) -> UsageAccount:
        """Return the account of a request that comes."""
        return UsageAccount(new_usage_id(), self._closed)

    def finish(self, account: UsageAccount, record: UsageRecord) -> None:
        """Take a request's end; its record is written once its engines have said what it used."""
        account.finish(record)
        if account.is_late:
            self._late.add(account)

    def _closed(self, account: UsageAccount, record: UsageRecord) -> None:
        if account in self._late:
            self._late.discard(account)
            # The request's own line is out already, without this.
            _log.info("usage", **asdict(record))
        if account.is_continuing:  # the prompt was counted where the stream began
            self._on_record(replace(record, input_tokens=0, cached_tokens=0, output_tokens=record.generated_tokens))
        else:
            self._on_record(record)
        if not self._max_records:
            return
        if len(self._pending) >= MAX_PENDING:
            self._pending.popleft()
            self._on_drop()
        kept_s = MARK_S + (int(self._resume_window_s) if account.is_resumable else 0)
        mark = f"{USAGE_KEY}:mark:{record.usage_id}"
        began_at = f"{record.ended_at - record.duration_s:.3f}"
        self._pending.append(_Pending(encoded(record), mark, new_usage_id(), began_at, kept_s))
        self._has_work.set()

    async def run(self) -> None:
        """Write records for ever."""
        await keep_doing(self._turn, name="the usage ledger", max_pause_s=RETRY_PAUSE_S)

    async def close(self) -> None:
        """Write what is left, if Valkey takes it in time."""
        for account in tuple(self._late):
            account.give_up()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                while self._pending:
                    await self._write()
        except (LoraplexError, TimeoutError) as error:
            _log.warning("usage records are lost but for the log", num_records=len(self._pending), cause=str(error))

    async def _turn(self) -> None:
        await self._has_work.wait()
        await asyncio.sleep(GATHER_S)
        while self._pending:
            await self._write()
        self._has_work.clear()

    async def _write(self) -> None:
        batch = [self._pending[index] for index in range(min(MAX_BATCH, len(self._pending)))]
        marks = [each.mark for each in batch]
        values: list[Any] = [self._max_records]
        for each in batch:
            values += (each.text, each.call_id, each.began_at, each.kept_s)
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await self._valkey.eval(WRITE, 1 + len(marks), USAGE_KEY, *marks, *values)
        written = {id(each) for each in batch}
        while self._pending and id(self._pending[0]) in written:  # some may have been dropped meanwhile
            self._pending.popleft()
