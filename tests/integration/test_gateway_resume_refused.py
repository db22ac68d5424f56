"""A resume that does not fit is refused by name, before it costs anything, and spoils nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest
from loraplex.v1 import gateway_pb2
from loraplex_common.errors import InvalidParameterError, NotSupportedError, ResumeInvalidError
from loraplex_common.rpc_errors import error_from_rpc
from support.cut_streams import CUT, NUM_TOKENS, another_gateway, cut, long_text, read_all, refusal
from support.gateway_rig import running_gateway, text_request
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


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
