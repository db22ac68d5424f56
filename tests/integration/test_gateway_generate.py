"""GatewayService.Generate over real gRPC: what a stream consists of."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from loraplex.v1 import gateway_pb2
from support.gateway_rig import DIGEST, OTHER_DIGEST, letters, running_gateway, text_request

pytestmark = pytest.mark.integration


async def test_a_stream_is_started_chunks_finished(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        responses = [response async for response in rig.stub.Generate(text_request())]

        kinds = [response.WhichOneof("event") for response in responses]
        chunks = [response.chunk for response in responses if response.HasField("chunk")]
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        assert kinds[0] == "started"
        assert kinds[-1] == "finished"
        assert set(kinds[1:-1]) == {"chunk"}
        assert tokens == list(letters(rig.engine.submits[0]))
        assert [chunk.sequence for chunk in chunks] == list(range(len(chunks)))
        assert [chunk.index for chunk in chunks] == [
            sum(len(c.token_ids) for c in chunks[:n]) for n in range(len(chunks))
        ]
        model = rig.app.catalog.models[0]
        assert "".join(chunk.text for chunk in chunks) == model.tokenizer.decode_now(tokens, skip_special_tokens=True)
        assert responses[-1].finished.usage.output_tokens == 8
        rig.check_idle()
