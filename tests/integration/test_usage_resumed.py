"""A stream that its client resumes has one record, whatever gateways took part and when they write."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
from loraplex_common.usage_records import UsageRecord, read_usage
from loraplex_gateway.usage.ledger import UsageLedger
from support.cut_streams import CUT, NUM_TOKENS, another_gateway, cut, long_text, read_all
from support.engine_double import KV_PAGE_S
from support.gateway_rig import running_gateway
from support.usage import make_record, written
from support.waiting import eventually

pytestmark = pytest.mark.integration


async def test_a_stream_that_is_resumed_elsewhere_leaves_one_record(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as one, another_gateway(valkey_url) as two:
        got = await cut(one, long_text(adapter="poet"))
        (before,) = await written(one)
        await read_all(two, got.resumed())

        async def is_merged() -> bool:
            return (await written(two))[0].calls == 2

        await eventually(is_merged)
        (record,) = await written(two)
        assert (before.code, before.output_tokens) == ("CANCELLED", CUT)
        assert (record.code, record.output_tokens, record.input_tokens) == ("OK", NUM_TOKENS, before.input_tokens)
        assert record.kv_page_s == 2 * KV_PAGE_S
        assert record.usage_id == before.usage_id


async def test_tokens_that_are_made_again_and_again_count_each_time(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        got = await cut(rig, long_text())
        for calls in (2, 3):
            await read_all(rig, got.resumed(token_ids=[], last_sequence=0, num_text_bytes=0))

            async def is_merged(calls: int = calls) -> bool:
                return (await written(rig))[0].calls == calls

            await eventually(is_merged)

        (record,) = await written(rig)
        assert record.output_tokens == record.generated_tokens == CUT + 2 * NUM_TOKENS


async def test_a_stream_whose_gateway_was_killed_is_all_in_the_record_of_the_next(valkey_url: str) -> None:
    async with running_gateway(valkey_url, usage_records=0) as one, another_gateway(valkey_url) as two:
        got = await cut(one, long_text())  # `one` never gets to write its part
        await read_all(two, got.resumed())

        (record,) = await written(two)
        assert (record.output_tokens, record.calls) == (NUM_TOKENS, 1)


@pytest.mark.parametrize("order", list(permutations(range(3))))
async def test_what_ended_a_resumed_stream_is_its_last_calls_word_in_whatever_order_gateways_write(
    valkey_url: str, order: tuple[int, ...]
) -> None:
    async with running_gateway(valkey_url, usage_records=0) as rig:
        calls = [  # the gateways of the first two learn only after the third's end that the stream went on elsewhere
            record_of_call(began_at=1.0, ended_at=9.0, cached_tokens=1, code="ABORTED"),
            record_of_call(began_at=2.0, ended_at=8.0, cached_tokens=2, code="ABORTED"),
            record_of_call(began_at=3.0, ended_at=4.0, cached_tokens=3, code="OK"),
        ]
        for number in order:
            ledger = UsageLedger(rig.valkey, max_records=10, resume_window_s=60)
            account = ledger.open()
            account.usage_id, account.is_resumable = "u1", True
            ledger.finish(account, calls[number])
            await ledger.close()

        (record,) = [record async for record in read_usage(rig.valkey)]
        assert (record.code, record.ended_at, record.cached_tokens) == ("OK", 4.0, 1)
        assert (record.calls, record.duration_s) == (3, 15.0)


def record_of_call(*, began_at: float, **fields: Any) -> UsageRecord:
    return replace(make_record("u1"), duration_s=fields["ended_at"] - began_at, **fields)
