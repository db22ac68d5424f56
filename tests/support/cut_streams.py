"""Streams that break off, and the requests with which their clients resume them."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from loraplex.v1 import gateway_pb2
from loraplex_common.rpc_errors import error_from_rpc
from support.gateway_rig import Rig, running_gateway, text_request
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loraplex_common.errors import LoraplexError

NUM_TOKENS = 20
CUT = 7


def long_text(**fields: Any) -> gateway_pb2.GenerateRequest:
    fields.setdefault("stopping", gateway_pb2.StoppingParams(max_new_tokens=NUM_TOKENS))
    return text_request(request_id="r1", **fields)


@dataclass
class Cut:
    """A request, and the part of its stream that came before it broke off."""

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
        """Return the request that resumes it; `changes` are applied to it, or to its `resume`."""
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
    """Read a stream up to a position in the output, then break it off."""
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
    """Read a stream to its end; it may have been read in part before."""
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
    """Run a gateway without engines of its own; it finds the engines that the first gateway's rig has registered."""
    async with running_gateway(valkey_url, num_engines=0, **options) as rig:
        await eventually(lambda: any(link.is_candidate for link in rig.app.pool.links))
        yield rig
