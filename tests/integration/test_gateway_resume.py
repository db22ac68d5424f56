"""Streams that clients resume, through the same gateway or another."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from loraplex.v1 import gateway_pb2
from loraplex_common.errors import (
    AdapterForbiddenError,
    AdapterNotFoundError,
    InvalidParameterError,
    LoraplexError,
    NotSupportedError,
    RequestRunningError,
    ResumeInvalidError,
    StreamInterruptedError,
)
from loraplex_common.rpc_errors import error_from_rpc
from loraplex_gateway.claims import RequestClaims
from support.gateway_rig import DIGEST, OTHER_DIGEST, Rig, letters, running_gateway, text_request
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.integration

NUM_TOKENS = 20
CUT = 7


def long_text(**fields: Any) -> gateway_pb2.GenerateRequest:
    fields.setdefault("stopping", gateway_pb2.StoppingParams(max_new_tokens=NUM_TOKENS))
    return text_request(request_id="r1", **fields)


@dataclass
class Cut:
    """A request, and what had come of it when its stream broke."""

    request: gateway_pb2.GenerateRequest
    responses: list[gateway_pb2.GenerateResponse]

    @property
    def started(self) -> gateway_pb2.Started:
        return self.responses[0].started

    @property
    def token_ids(self) -> list[int]:
        return [token for response in self.responses for token in response.chunk.token_ids]

    @property
    def text(self) -> str:
        return "".join(response.chunk.text for response in self.responses)

    def resumed(self, **changes: Any) -> gateway_pb2.GenerateRequest:
        """Return the request that goes on; `changes` are of it, or of its `resume`."""
        request, resume = gateway_pb2.GenerateRequest(), gateway_pb2.Resume()
        request.CopyFrom(self.request)
        resume.resume_token = self.started.resume_token
        resume.last_sequence = self.responses[-1].chunk.sequence
        resume.token_ids.extend(self.token_ids)
        resume.num_text_bytes = len(self.text.encode())
        for name, value in changes.items():
            target: Any = resume if name in resume.DESCRIPTOR.fields_by_name else request
            target.ClearField(name)
            if isinstance(value, list):
                getattr(target, name).extend(value)
            elif hasattr(value, "DESCRIPTOR"):
                getattr(target, name).CopyFrom(value)
            else:
                setattr(target, name, value)
        request.resume.CopyFrom(resume)
        return request


async def read_up_to(call: Any, request: gateway_pb2.GenerateRequest, num_tokens: int) -> Cut:
    got = Cut(request, [])
    while len(got.token_ids) < num_tokens:
        got.responses.append(await call.read())
    return got


async def cut(rig: Rig, request: gateway_pb2.GenerateRequest, *, at: int = CUT) -> Cut:
    """Read a stream up to a position in the output, then lose it."""
    for engine in rig.engines:
        engine.hold_at = at
    call = rig.stub.Generate(request)
    got = await read_up_to(call, request, at - len(request.resume.token_ids))
    call.cancel()
    await eventually(lambda: rig.app.claims.num_running == 0)
    for engine in rig.engines:
        engine.release()
    return got


async def rest_of(call: Any) -> list[gateway_pb2.GenerateResponse]:
    """Read a stream to its end, also one that has been read in part."""
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


async def read_all(rig: Rig, request: gateway_pb2.GenerateRequest) -> list[gateway_pb2.GenerateResponse]:
    return await rest_of(rig.stub.Generate(request, timeout=20))


async def refusal(rig: Rig, request: gateway_pb2.GenerateRequest, **options: Any) -> LoraplexError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in rig.stub.Generate(request, timeout=20, **options):
            pass
    return error_from_rpc(caught.value)


@asynccontextmanager
async def another_gateway(valkey_url: str, **options: Any) -> AsyncIterator[Rig]:
    """Run a gateway without engines of its own: it finds those that the first one's rig has registered."""
    async with running_gateway(valkey_url, num_engines=0, **options) as rig:
        await eventually(lambda: any(session.is_candidate for session in rig.app.pool.sessions))
        yield rig


async def test_a_stream_goes_on_through_another_gateway_exactly_where_it_was(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as one, another_gateway(valkey_url) as two:
        request = long_text(adapter="poet", response_options=gateway_pb2.ResponseOptions(logprobs=1))
        got = await cut(one, request)
        original = one.engine.submits[-1]

        responses = await read_all(two, got.resumed())

        (resumed,) = one.engine.submits[1:]
        assert list(resumed.resumed_token_ids) == list(letters(original))[:CUT]
        assert resumed.prompt_token_ids == original.prompt_token_ids
        assert (resumed.adapter_digest, resumed.sampling.seed) == (DIGEST, original.sampling.seed)
        whole = Cut(request, [*got.responses, *responses])
        chunks = [response.chunk for response in whole.responses if response.HasField("chunk")]
        assert [chunk.sequence for chunk in chunks] == list(range(len(chunks)))
        assert whole.token_ids == list(letters(original))
        assert [entry.chosen.token_id for chunk in chunks for entry in chunk.logprobs] == whole.token_ids
        assert responses[0].started.seed == original.sampling.seed
        assert responses[0].started.resume_token
        finished = responses[-1].finished
        assert finished.finish_reason == gateway_pb2.FINISH_REASON_LENGTH
        assert (finished.usage.output_tokens, finished.usage.prompt_tokens) == (NUM_TOKENS, got.started.prompt_tokens)
        await eventually(lambda: one.app.claims.num_running == two.app.claims.num_running == 0)
        one.check_idle()
        two.check_idle()


async def test_a_moved_label_changes_nothing_and_a_lost_right_or_revision_is_refused(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        got = await cut(rig, long_text(adapter="poet:prod"))
        base = rig.engine.base.fingerprint

        rig.store.put("poet", {"latest": OTHER_DIGEST, "prod": DIGEST}, fingerprint=base)
        names = rig.app.names
        await eventually(lambda: (entry := names.entry("poet")) and entry.labels["prod"] == DIGEST)
        responses = await read_all(rig, got.resumed())
        assert responses[0].started.adapter_revision == rig.engine.submits[-1].adapter_digest == OTHER_DIGEST

        rig.store.put("poet", {"prod": DIGEST}, fingerprint=base)
        await eventually(lambda: (entry := names.entry("poet")) and OTHER_DIGEST not in entry.base_fingerprints)
        assert isinstance(await refusal(rig, got.resumed()), AdapterNotFoundError)

        rig.store.put("poet", {"prod": OTHER_DIGEST}, fingerprint=base, allowed=["vip"])
        await eventually(lambda: (entry := names.entry("poet")) and not entry.allows("default"))
        assert isinstance(await refusal(rig, got.resumed()), AdapterForbiddenError)


@pytest.mark.parametrize(
    ("changes", "cause", "words"),
    [
        ({"resume_token": "forged"}, "forged", "--resume-key-file"),
        ({"request_id": "r2"}, "changed", "request_id"),
        ({"adapter": "stranger"}, "changed", "adapter"),
        ({"text": "another prompt"}, "changed", "send the same request"),
        ({"sampling": gateway_pb2.SamplingParams(temperature=0.5)}, "changed", "send the same request"),
        ({"sampling": gateway_pb2.SamplingParams(seed=5)}, "changed", "sampling.seed"),
        ({"stopping": gateway_pb2.StoppingParams(max_new_tokens=9)}, "changed", "send the same request"),
        ({"response_options": gateway_pb2.ResponseOptions(logprobs=1)}, "changed", "send the same request"),
        ({"adapter_scale": 0.5}, "changed", "send the same request"),
        ({"token_ids": [10] * (NUM_TOKENS + 1)}, "token_ids", "at most 20"),
        ({"token_ids": [10**6] * CUT}, "token_ids", "token ids of this model"),
        ({"token_ids": [1, 10] * 3}, "token_ids", "ends the output"),
        ({"last_sequence": CUT + 1}, "last_sequence", "beyond 7 tokens"),
        ({"num_text_bytes": 3}, "text", "the client has 3"),
    ],
    ids=lambda value: str(value)[:24].replace("\n", " "),
)
async def test_what_does_not_fit_is_refused_by_name(
    valkey_url: str, changes: dict[str, Any], cause: str, words: str
) -> None:
    async with running_gateway(valkey_url) as rig:
        got = await cut(rig, long_text(adapter="poet"))
        num_submits = len(rig.engine.submits)

        error = await refusal(rig, got.resumed(**changes))

        assert isinstance(error, ResumeInvalidError)
        assert error.metadata == {"cause": cause}
        assert words in error.message
        assert len(rig.engine.submits) == num_submits
        await eventually(lambda: rig.app.claims.num_running == 0)
        rig.check_idle()
        assert (await read_all(rig, got.resumed()))[-1].HasField("finished")  # and nothing was spoilt


async def test_a_forged_token_has_nothing_tokenised(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        request = long_text()
        request.resume.resume_token = "x" * 300
        request.text = ""  # no prompt that could be tokenised: had it been looked at, that would be said

        assert isinstance(await refusal(rig, request), ResumeInvalidError)


async def test_a_token_is_its_tenants_and_ages(valkey_url: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("key-a a\nkey-b b\n")
    options: dict[str, Any] = {"api_keys_file": keys, "channel_options": {"api_key": "key-a"}}
    async with running_gateway(valkey_url, **options) as rig:
        got = await cut(rig, long_text())
        async with another_gateway(valkey_url, **options | {"channel_options": {"api_key": "key-b"}}) as other:
            error = await refusal(other, got.resumed())
            assert isinstance(error, ResumeInvalidError)
            assert error.metadata == {"cause": "tenant"}
        async with another_gateway(valkey_url, **options, resume_window_s=1e-6) as hasty:
            error = await refusal(hasty, got.resumed())
            assert error.metadata == {"cause": "expired"}
            assert "--resume-window-s" in error.message
        async with another_gateway(valkey_url, **options, resume_window_s=0) as never:
            assert isinstance(await refusal(never, got.resumed()), NotSupportedError)
            assert not (await read_all(never, text_request()))[0].started.resume_token


async def test_what_cannot_be_resumed_has_no_token(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        no_ids = text_request(response_options=gateway_pb2.ResponseOptions(token_ids=False))
        assert not (await read_all(rig, no_ids))[0].started.resume_token
        once = gateway_pb2.GenerateOnceRequest(request=text_request())
        assert not (await rig.stub.GenerateOnce(once)).started.resume_token

        once.request.resume.resume_token = "x"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.GenerateOnce(once)
        error = error_from_rpc(caught.value)
        assert isinstance(error, InvalidParameterError)
        assert error.field == "resume"


async def test_gateways_with_a_key_file_need_no_valkey_to_agree(valkey_url: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name[0] * 40)
    async with (
        running_gateway(valkey_url, resume_key_file=tmp_path / "one") as one,
        another_gateway(valkey_url, resume_key_file=tmp_path / "one") as same,
        another_gateway(valkey_url, resume_key_file=tmp_path / "two") as different,
    ):
        got = await cut(one, long_text())

        assert (await refusal(different, got.resumed())).metadata == {"cause": "forged"}
        assert (await read_all(same, got.resumed()))[-1].HasField("finished")


async def test_who_resumes_on_the_same_gateway_ends_the_old_stream(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=2) as rig:
        for engine in rig.engines:
            engine.hold_at = CUT
        old: Any = rig.stub.Generate(long_text())
        got = await read_up_to(old, long_text(), CUT)
        holder = next(engine for engine in rig.engines if engine.submits)

        new: Any = rig.stub.Generate(got.resumed(), timeout=20)
        assert (await new.read()).HasField("started")

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await old.read()
        error = error_from_rpc(caught.value)
        assert isinstance(error, RequestRunningError)
        assert "another call has resumed" in error.message
        assert not error.metadata.get("resume_token")
        await holder.wait_for(lambda: holder.aborted_ids == ["r1"])
        for engine in rig.engines:
            engine.release()
        responses = await rest_of(new)
        assert responses[-1].finished.usage.output_tokens == NUM_TOKENS
        await eventually(lambda: rig.app.claims.num_running == 0)
        rig.check_idle()


async def test_who_resumes_elsewhere_ends_the_old_stream_at_its_renewal(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as one, another_gateway(valkey_url) as two:
        one.engine.hold_at = CUT
        old: Any = one.stub.Generate(long_text())
        got = await read_up_to(old, long_text(), CUT)
        new: Any = two.stub.Generate(got.resumed(), timeout=20)
        assert (await new.read()).HasField("started")
        assert await two.app.claims.owner("default", "r1") == two.app.gateway_id

        await one.app.claims._renew()

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await old.read()
        assert isinstance(error_from_rpc(caught.value), RequestRunningError)
        assert await two.app.claims.owner("default", "r1") == two.app.gateway_id
        one.engine.release()
        assert (await rest_of(new))[-1].HasField("finished")


async def test_the_claim_of_a_gateway_that_is_gone_stands_in_nobodys_way(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        got = await cut(rig, long_text())
        dead = RequestClaims(rig.valkey, "dead")
        held = dead.hold("default", "r1")
        await held.__aenter__()  # it has just said that it lives, and never will again

        assert isinstance(await refusal(rig, long_text()), RequestRunningError)
        assert (await read_all(rig, got.resumed()))[-1].HasField("finished")


async def test_errors_of_a_stream_that_can_be_resumed_carry_its_token(valkey_url: str) -> None:
    async with running_gateway(valkey_url, failover_wait_s=0.0) as rig:
        rig.engine.hold_at = CUT
        call = rig.stub.Generate(long_text())
        got = await read_up_to(call, long_text(), CUT)

        running = await refusal(rig, long_text())
        assert isinstance(running, RequestRunningError)
        assert running.metadata["resume_token"] == got.started.resume_token

        await rig.engine.unregister(rig.valkey)
        await rig.engine.kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        interrupted = error_from_rpc(caught.value)
        assert isinstance(interrupted, StreamInterruptedError)
        assert interrupted.metadata["resume_token"] == got.started.resume_token


async def test_a_resumed_stream_keeps_its_time_limit_and_its_token_can_be_used_again(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        request = long_text(time_limit=Duration(seconds=100))
        got = await cut(rig, request, at=3)
        again = await cut(rig, got.resumed(), at=5)
        assert again.token_ids == list(letters(rig.engine.submits[0]))[3:5]
        both = Cut(request, [again.responses[0], *got.responses[1:], *again.responses[1:]])

        responses = await read_all(rig, both.resumed())

        assert Cut(request, [*both.responses, *responses]).token_ids == list(letters(rig.engine.submits[0]))
        limits = [submit.time_limit.ToNanoseconds() / 1e9 for submit in rig.engine.submits]
        assert limits[0] == pytest.approx(100, abs=0.1)
        assert limits[0] > limits[1] > limits[2] > 80


async def test_prompt_logprobs_and_a_refusal_to_wait_are_the_first_streams_matter(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        options = gateway_pb2.ResponseOptions(prompt_logprobs=1)
        got = await cut(rig, long_text(response_options=options, load_policy=gateway_pb2.LOAD_POLICY_FAIL_FAST))

        await read_all(rig, got.resumed())

        first, second = rig.engine.submits
        assert (first.HasField("prompt_logprobs"), second.HasField("prompt_logprobs")) == (True, False)
        assert first.load_policy == gateway_pb2.LOAD_POLICY_FAIL_FAST
        assert second.load_policy == gateway_pb2.LOAD_POLICY_WAIT


async def test_tokens_are_counted_once(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        got = await cut(rig, long_text())
        await read_all(rig, got.resumed())

        def sample(name: str, **labels: str) -> float:
            return rig.app._metrics_registry.get_sample_value(name, labels) or 0.0

        tokens = "loraplex_gateway_tokens_total"
        await eventually(lambda: sample(tokens, tenant="default", kind="output") == NUM_TOKENS)
        assert sample(tokens, tenant="default", kind="input") == got.started.prompt_tokens
        assert sample("loraplex_gateway_client_resumes_total", outcome="continued") == 1
