"""What requests used is written once each, whatever becomes of engines, gateways, streams and Valkey."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
import uuid
from dataclasses import replace
from typing import Any

import grpc
import pytest
from loraplex.v1 import gateway_pb2
from loraplex_client.cli.app import app
from loraplex_common.usage_records import USAGE_KEY, read_usage
from loraplex_gateway.usage.ledger import UsageLedger, encoded
from support.cut_streams import CUT, NUM_TOKENS, long_text, read_up_to
from support.engine_double import ADAPTER_PAGE_S, KV_PAGE_S
from support.gateway_rig import DIGEST, running_gateway, text_request
from support.generation import greedy
from support.stack import Stack, assert_idle, read_metrics
from support.stack_fixtures import import_all
from support.usage import make_record, written
from support.waiting import eventually
from typer.testing import CliRunner

pytestmark = pytest.mark.integration

Once = gateway_pb2.GenerateOnceRequest


async def test_a_request_leaves_one_record_of_what_it_used(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        answer = await rig.stub.GenerateOnce(Once(request=text_request(request_id="r1", adapter="poet:latest")))

        (record,) = await written(rig)

        assert (record.request_id, record.adapter, record.revision) == ("r1", "poet:latest", DIGEST)
        assert (record.tenant, record.code, record.reason) == ("default", "OK", "LENGTH")
        usage = answer.finished.usage
        assert (record.input_tokens, record.output_tokens) == (usage.prompt_tokens, usage.output_tokens)
        assert (record.kv_page_s, record.adapter_page_s) == (KV_PAGE_S, ADAPTER_PAGE_S)
        assert (record.calls, record.attempts, record.unmetered_attempts) == (1, 1, 0)


async def test_a_request_that_a_stop_string_ended_waits_for_its_engines_word(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        whole = await rig.stub.GenerateOnce(Once(request=long_text()))
        await written(rig)
        await rig.valkey.delete(USAGE_KEY)
        stopping = gateway_pb2.StoppingParams(max_new_tokens=NUM_TOKENS, stop_strings=[whole.text[5]])
        rig.engine.hold_at = CUT
        await rig.stub.GenerateOnce(Once(request=text_request(stopping=stopping)), timeout=20)

        (record,) = await written(rig)

        assert (record.reason, record.kv_page_s, record.unmetered_attempts) == ("STOP", KV_PAGE_S, 0)


async def test_a_request_that_no_engine_heard_of_leaves_no_record(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        with pytest.raises(grpc.aio.AioRpcError):
            await rig.stub.GenerateOnce(Once(request=text_request(adapter="nobody")))
        await rig.stub.GenerateOnce(Once(request=text_request(request_id="r2")))

        assert [record.request_id for record in await written(rig)] == ["r2"]


async def test_a_request_that_moves_to_another_engine_leaves_one_record(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=2) as rig:
        for engine in rig.engines:
            engine.hold_at = CUT
        call = rig.stub.Generate(long_text())
        await read_up_to(call, long_text(), CUT)
        first = next(engine for engine in rig.engines if engine.submits)
        second = next(engine for engine in rig.engines if engine is not first)
        second.release()

        await first.kill()
        while await call.read() is not grpc.aio.EOF:
            pass

        (record,) = await written(rig)
        assert (record.output_tokens, record.calls) == (NUM_TOKENS, 1)
        assert (record.attempts, record.unmetered_attempts, record.kv_page_s) == (2, 1, KV_PAGE_S)


async def test_a_request_id_that_comes_again_is_another_request(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        for _ in range(2):
            await rig.stub.GenerateOnce(Once(request=text_request(request_id="r1")))

        async def are_two() -> bool:
            return len(await written(rig)) == 2

        await eventually(are_two)


class Forgetful:
    """A client of Valkey that loses the answers of its first writes: the writes are done."""

    def __init__(self, valkey: Any, num_lost: int) -> None:
        self._valkey, self.num_lost = valkey, num_lost

    async def eval(self, *arguments: Any) -> Any:
        answer = await self._valkey.eval(*arguments)
        if self.num_lost:
            self.num_lost -= 1
            raise ConnectionError("the answer was lost")
        return answer


async def test_a_write_whose_answer_was_lost_is_not_a_second_record(valkey_url: str) -> None:
    async with running_gateway(valkey_url, usage_records=0) as rig:
        ledger = UsageLedger(Forgetful(rig.valkey, 1), max_records=10, resume_window_s=0)  # type: ignore[arg-type]
        account = ledger.open()
        account.attempt().reported(1.0, 0.0)
        ledger.finish(account, make_record(account.usage_id))
        task = asyncio.create_task(ledger.run())
        await eventually(lambda: ledger.num_pending == 0)
        task.cancel()

        assert len([record async for record in read_usage(rig.valkey)]) == 1


async def test_a_text_that_is_no_unicode_keeps_no_other_record_from_being_written(valkey_url: str) -> None:
    async with running_gateway(valkey_url, usage_records=0) as rig:
        ledger = UsageLedger(rig.valkey, max_records=10, resume_window_s=0)
        for trace_id in ("before", "caf\u00e9 \ud800", "after"):
            account = ledger.open()
            ledger.finish(account, replace(make_record(account.usage_id), trace_id=trace_id))

        await ledger.close()

        found = [record.trace_id async for record in read_usage(rig.valkey)]
        assert sorted(found) == ["after", "before", "caf\u00e9 ?"]


async def test_what_is_not_written_when_the_gateway_ends_is_written_then(valkey_url: str) -> None:
    async with running_gateway(valkey_url, usage_records=0) as rig:
        ledger = UsageLedger(rig.valkey, max_records=10, resume_window_s=0)
        account = ledger.open()
        account.attempt()  # its engine has not said what was used
        ledger.finish(account, make_record(account.usage_id))

        await ledger.close()

        (record,) = [record async for record in read_usage(rig.valkey)]
        assert record.unmetered_attempts == 1


async def test_the_command_names_an_entry_that_is_no_record_and_sums_the_others(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplex_common.valkey import connect

    valkey = connect(valkey_url)
    await valkey.xadd(USAGE_KEY, {"record": encoded(make_record("u1"))})
    text = encoded(make_record("u2")).decode().replace('"input_tokens":1', '"input_tokens":null')
    added: Any = await valkey.xadd(USAGE_KEY, {"record": text})
    entry = added.decode()
    monkeypatch.setenv("LORAPLEX_REDIS_URL", valkey_url)
    command = ["usage", "--json"]

    spoilt = await asyncio.to_thread(CliRunner().invoke, app, command)
    await valkey.xdel(USAGE_KEY, entry)
    mended = await asyncio.to_thread(CliRunner().invoke, app, command)
    await valkey.aclose()

    assert spoilt.exit_code == 1
    assert spoilt.stdout == mended.stdout
    assert json.loads(spoilt.stdout)["requests"] == 1
    assert f"the sums are without 1 of the entries of {USAGE_KEY}" in spoilt.stderr
    assert f"{entry}: input_tokens is null, not a number" in spoilt.stderr
    assert f"XDEL {USAGE_KEY} {entry}" in spoilt.stderr
    assert (mended.exit_code, mended.stderr) == (0, "")


async def test_records_of_a_real_stack_add_up_to_its_pools_integral(
    tiny_stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_all(tiny_stack)
    client = tiny_stack.client()
    await greedy(client, "tiny-a", 2)
    await assert_idle(tiny_stack.engines[0])
    before, kv_before = read_metrics(tiny_stack.engines[0]), kv_page_s(tiny_stack)
    asked = {str(uuid.uuid4()): (n, adapter) for n in range(4) for adapter in (None, "tiny-a", "tiny-b")}
    streams = [greedy(client, adapter, 40 + 10 * n, request_id=key) for key, (n, adapter) in asked.items()]
    await asyncio.gather(*streams)
    await client.close()
    await assert_idle(tiny_stack.engines[0])

    async def are_all_written() -> bool:
        return asked.keys() <= {record.request_id async for record in records_of(tiny_stack)}

    await eventually(are_all_written)
    after, kv_after = read_metrics(tiny_stack.engines[0]), kv_page_s(tiny_stack)
    records = [record async for record in records_of(tiny_stack) if record.request_id in asked]
    leased = "loraplex_engine_leased_page_seconds_total"
    assert sum(record.adapter_page_s for record in records) == pytest.approx(after[leased] - before[leased], rel=0.01)
    assert sum(record.kv_page_s for record in records) == pytest.approx(kv_after - kv_before, rel=0.01)
    assert all(record.kv_page_s > 0 for record in records)
    lines = await asyncio.to_thread(usage_lines, tiny_stack, monkeypatch)
    used = {line["adapter"]: line for line in lines}
    assert used["tiny-b"]["requests"] >= 4
    assert used["tiny-b"]["output_tokens"] >= 40 + 50 + 60 + 70


def kv_page_s(stack: Stack) -> float:
    """Return the pool's own integral of the pages that sequences held."""
    with urllib.request.urlopen(f"http://{stack.engines[0].addresses['metrics']}/metrics", timeout=10) as page:
        match = re.search(
            r'^loraplex_engine_page_seconds_total\{[^}]*owner="kv"[^}]*\} (\S+)', page.read().decode(), re.M
        )
    assert match is not None
    return float(match[1])


async def records_of(stack: Stack) -> Any:
    from loraplex_common.valkey import connect

    valkey = connect(stack.valkey.url)
    try:
        async for record in read_usage(valkey):
            yield record
    finally:
        await valkey.aclose()


def usage_lines(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setenv("LORAPLEX_REDIS_URL", stack.valkey.url)
    result = CliRunner().invoke(app, ["usage", "--since", "1h", "--by", "adapter", "--json"])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.output.splitlines()]
