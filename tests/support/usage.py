"""Usage records: those that a gateway has written, and made-up ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.usage_records import USAGE_KEY, UsageRecord, read_usage
from support.waiting import eventually

if TYPE_CHECKING:
    from support.gateway_rig import Rig


async def written(rig: Rig) -> list[UsageRecord]:
    """Return the records of all requests that have ended; there is at least one."""

    async def are_there() -> bool:
        return rig.app.ledger.num_pending == 0 and await rig.valkey.xlen(USAGE_KEY) > 0

    await eventually(are_there)
    return [record async for record in read_usage(rig.valkey)]


def make_record(usage_id: str) -> UsageRecord:
    return UsageRecord(
        usage_id=usage_id,
        request_id="r",
        trace_id="t",
        tenant="acme",
        model="m",
        adapter="",
        revision="",
        input_tokens=1,
        cached_tokens=0,
        output_tokens=2,
        code="OK",
        reason="STOP",
        ended_at=1.0,
    )
