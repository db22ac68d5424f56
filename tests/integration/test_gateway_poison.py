"""A request that ends its engine's session whenever it is sent, beside requests that merely lose their engines."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from loraplex.v1 import gateway_pb2
from loraplex_common.errors import RequestLostError
from loraplex_common.rpc_errors import error_from_rpc
from support.gateway_rig import Rig, letters, running_gateway, text_request

pytestmark = pytest.mark.integration

POISON = 17  # tokens, as no other prompt here
NUM_TOKENS = 20


def poison() -> gateway_pb2.GenerateRequest:
    return gateway_pb2.GenerateRequest(
        token_ids=gateway_pb2.TokenIds(ids=[9] * POISON), stopping=gateway_pb2.StoppingParams(max_new_tokens=4)
    )


def long_text() -> gateway_pb2.GenerateRequest:
    return text_request(stopping=gateway_pb2.StoppingParams(max_new_tokens=NUM_TOKENS))


def tokens_of(responses: list[gateway_pb2.GenerateResponse]) -> list[int]:
    return [token for response in responses for token in response.chunk.token_ids]


async def read(call: Any, num_tokens: int) -> list[gateway_pb2.GenerateResponse]:
    """Read a stream until it has given so many more tokens, or to its end."""
    responses: list[gateway_pb2.GenerateResponse] = []
    while len(tokens_of(responses)) < num_tokens and (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


@pytest.mark.parametrize("num_engines", [1, 2])
async def test_a_request_that_ends_sessions_is_sent_twice_at_most_and_others_streams_go_on(
    valkey_url: str, num_engines: int
) -> None:
    async with running_gateway(valkey_url, num_engines=num_engines) as rig:
        for engine in rig.engines:
            engine.poison, engine.hold_at = POISON, 5
        stranger = rig.stub.Generate(long_text(), timeout=30)
        responses = await read(stranger, 5)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=poison()), timeout=30)

        error = error_from_rpc(caught.value)
        assert isinstance(error, RequestLostError), error
        assert "not sent again" in error.message
        assert sum(len(s.prompt_token_ids) == POISON for engine in rig.engines for s in engine.submits) == 2
        for engine in rig.engines:
            engine.release()
        responses += await read(stranger, 10 * NUM_TOKENS)
        assert tokens_of(responses) == list(letters(_first_submit(rig)))
        assert responses[-1].HasField("finished")
        rig.check_idle()


async def test_a_request_that_gets_on_survives_the_loss_of_one_engine_after_another(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=4) as rig:
        for engine in rig.engines:
            engine.hold_at = 4
        call = rig.stub.Generate(long_text(), timeout=30)
        responses, alive = await read(call, 4), list(range(4))

        while len(alive) > 1:
            holder = next(n for n in alive if rig.engines[n].submits)
            alive.remove(holder)
            for n in alive:
                rig.engines[n].hold_at = len(tokens_of(responses)) + 4
            await rig.engines[holder].kill()
            responses += await read(call, 4)
        last = rig.engines[alive[0]]
        last.release()
        responses += await read(call, 10 * NUM_TOKENS)

        assert tokens_of(responses) == list(letters(last.submits[0]))
        assert responses[-1].HasField("finished")


def _first_submit(rig: Rig) -> Any:
    return next(s for engine in rig.engines for s in engine.submits if len(s.prompt_token_ids) != POISON)
