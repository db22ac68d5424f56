"""GatewayService.Generate over real gRPC: what a stream consists of."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest
from loraplex.v1 import gateway_pb2
from loraplex_common.auth import ANYBODY
from loraplex_common.base_model import load_base_model
from loraplex_gateway.requests.callers import cache_salt
from support.base_models import TinyBase, write_base_model
from support.gateway_rig import DIGEST, OTHER_DIGEST, letters, model_directory, running_gateway, text_request
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

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


async def test_nothing_is_sent_before_started_unless_asked_for(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        asked = [r.WhichOneof("event") async for r in rig.stub.Generate(text_request(progress_events=True))]

        assert asked[:2] == ["accepted", "started"]


async def test_an_adapter_goes_to_the_engine_as_its_digest(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        for name, digest in [("poet", DIGEST), ("poet:prod", OTHER_DIGEST), (f"poet@{OTHER_DIGEST}", OTHER_DIGEST)]:
            response = await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=text_request(adapter=name)))
            assert response.started.adapter_revision == digest
            assert rig.engine.submits[-1].adapter_digest == digest


async def test_a_cold_adapter_is_hinted_to_the_store_once(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 0
        calls = [rig.stub.Generate(text_request(adapter="poet")) for _ in range(3)]
        await rig.engine.wait_for(lambda: len(rig.engine.submits) == 3)
        rig.engine.release()
        for call in calls:
            assert [r async for r in call]

        assert rig.store.prefetched == [(DIGEST, rig.engine.engine_id)]


async def test_everything_a_client_can_ask_for_reaches_the_engine(valkey_url: str) -> None:
    request = text_request(
        request_id="my-request",
        sampling=gateway_pb2.SamplingParams(
            temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, seed=42, repetition_penalty=1.1, logit_bias={3: 1.5}
        ),
        stopping=gateway_pb2.StoppingParams(max_new_tokens=4, min_new_tokens=2, stop_token_ids=[9], ignore_eos=True),
        priority=gateway_pb2.PRIORITY_HIGH,
        load_policy=gateway_pb2.LOAD_POLICY_FAIL_FAST,
        cache_salt="salt",
        adapter="poet",
        adapter_scale=0.5,
    )
    request.queue_timeout.seconds = 5
    request.time_limit.seconds = 7
    async with running_gateway(valkey_url) as rig:
        metadata = (("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),)
        responses = [r async for r in rig.stub.Generate(request, timeout=30, metadata=metadata)]

        (submit,) = rig.engine.submits
        assert submit.request_id == "my-request"
        assert submit.sampling == request.sampling
        assert (submit.stopping.max_new_tokens, submit.stopping.min_new_tokens) == (4, 2)
        assert (list(submit.stopping.stop_token_ids), submit.stopping.ignore_eos) == ([9], True)
        assert submit.priority == gateway_pb2.PRIORITY_HIGH
        assert submit.load_policy == gateway_pb2.LOAD_POLICY_FAIL_FAST
        assert (submit.cache_salt, submit.adapter_scale) == (cache_salt(ANYBODY, "salt"), 0.5)
        assert submit.fairness_key == "poet"
        assert submit.traceparent.startswith("00-0af7")
        assert 28 < submit.time_left.ToMilliseconds() / 1000 < 30.5  # gRPC rounds timeouts up on the wire
        assert 4 < submit.queue_timeout.ToMilliseconds() / 1000 <= 5
        assert 6 < submit.time_limit.ToMilliseconds() / 1000 <= 7
        assert responses[0].started.seed == 42


async def test_a_seed_is_drawn_and_reported(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        seeds = set()
        for _ in range(2):
            response = await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=text_request()))
            seeds.add(response.started.seed)
            assert rig.engine.submits[-1].sampling.seed == response.started.seed

        assert len(seeds) == 2


async def test_messages_go_through_the_chat_template(valkey_url: str) -> None:
    messages = gateway_pb2.ChatMessages(messages=[gateway_pb2.ChatMessage(role="user", content="hi")])
    async with running_gateway(valkey_url) as rig:
        tokenized = await rig.stub.Tokenize(gateway_pb2.TokenizeRequest(messages=messages))
        counted = await rig.stub.CountTokens(gateway_pb2.CountTokensRequest(messages=messages))
        await rig.stub.GenerateOnce(
            gateway_pb2.GenerateOnceRequest(request=gateway_pb2.GenerateRequest(messages=messages))
        )

        assert tokenized.rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert list(rig.engine.submits[0].prompt_token_ids) == list(tokenized.token_ids)
        assert counted.num_tokens == len(tokenized.token_ids)
        # What is left of the sequence is the default limit.
        assert rig.engine.submits[0].stopping.max_new_tokens == 512 - counted.num_tokens


async def test_tokenize_and_detokenize_are_inverse(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        request = gateway_pb2.TokenizeRequest(text="grüße 你好", add_special_tokens=False)
        tokenized = await rig.stub.Tokenize(request)
        detokenized = await rig.stub.Detokenize(gateway_pb2.DetokenizeRequest(token_ids=tokenized.token_ids))

        assert detokenized.text == "grüße 你好"


async def test_a_stop_string_ends_the_output_here_and_on_the_engine(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        model = rig.app.catalog.models[0]
        whole = await rig.stub.GenerateOnce(
            gateway_pb2.GenerateOnceRequest(
                request=text_request(stopping=gateway_pb2.StoppingParams(max_new_tokens=20))
            )
        )
        stop = model.tokenizer.decode_now(list(whole.token_ids[5:7]), skip_special_tokens=True)
        rig.engine.hold_at = 8

        stopped = await rig.stub.GenerateOnce(
            gateway_pb2.GenerateOnceRequest(
                request=text_request(stopping=gateway_pb2.StoppingParams(max_new_tokens=20, stop_strings=[stop]))
            ),
            timeout=10,
        )

        assert stopped.text == whole.text[: whole.text.index(stop)]
        assert stopped.finished.finish_reason == gateway_pb2.FINISH_REASON_STOP
        assert stopped.finished.stop_string == stop
        assert list(stopped.token_ids) == list(whole.token_ids[:7])
        await rig.engine.wait_for(lambda: len(rig.engine.aborted_ids) == 1)
        rig.check_idle()


async def test_an_end_of_text_token_is_reported_and_leaves_no_text(valkey_url: str) -> None:
    eos = 1

    async with running_gateway(valkey_url, reply=lambda submit: [40, 41, eos]) as rig:
        rig.engine.finish, rig.engine.stop_token_id = gateway_pb2.FINISH_REASON_STOP, eos
        response = await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=text_request()))

        model = rig.app.catalog.models[0]
        assert response.finished.stop_token_id == eos
        assert list(response.token_ids) == [40, 41, eos]
        assert response.text == model.tokenizer.decode_now([40, 41], skip_special_tokens=True)


async def test_logprobs_carry_the_tokens_text(valkey_url: str) -> None:
    options = gateway_pb2.ResponseOptions(logprobs=2)
    async with running_gateway(valkey_url) as rig:
        response = await rig.stub.GenerateOnce(
            gateway_pb2.GenerateOnceRequest(request=text_request(response_options=options))
        )

        model = rig.app.catalog.models[0]
        assert [entry.chosen.token_id for entry in response.logprobs] == list(response.token_ids)
        assert all(len(entry.top) == 2 for entry in response.logprobs)
        assert "".join(entry.chosen.text for entry in response.logprobs) == model.tokenizer.decode_now(
            list(response.token_ids), skip_special_tokens=True
        )


async def test_tokens_are_coalesced_only_while_the_client_lags(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.tokens_per_message = 4
        request = text_request(stopping=gateway_pb2.StoppingParams(max_new_tokens=16))

        sizes = [len(r.chunk.token_ids) async for r in rig.stub.Generate(request) if r.HasField("chunk")]

        assert sum(sizes) == 16
        assert all(size % 4 == 0 for size in sizes)


async def test_many_streams_share_one_session_without_mixing(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:

        async def one(n: int) -> tuple[int, list[int]]:
            request = gateway_pb2.GenerateRequest(
                token_ids=gateway_pb2.TokenIds(ids=[5] * (n + 1)),
                stopping=gateway_pb2.StoppingParams(max_new_tokens=20),
            )
            response = await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=request))
            return n, list(response.token_ids)

        results = await asyncio.gather(*(one(n) for n in range(100)))

        assert rig.engine.num_sessions == 1
        for n, tokens in results:
            assert tokens == [10 + (n + 1 + i) % 60 for i in range(20)]
        rig.check_idle()


async def test_models_are_listed_in_pages(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        names, token = [], ""
        while True:
            page = await rig.stub.ListModels(gateway_pb2.ListModelsRequest(page_size=1, page_token=token))
            names += [card.name for card in page.models]
            token = page.next_page_token
            if not token:
                break

        # `secret` is another tenant's, `stranger` belongs to a base model that is not served here.
        assert names == ["tiny", "poet"]
        card = (await rig.stub.GetModel(gateway_pb2.GetModelRequest(name="poet:prod"))).model
        assert (card.revision, card.base_model) == (OTHER_DIGEST, "tiny")
        assert {alias.label: alias.revision for alias in card.aliases} == {"latest": DIGEST, "prod": OTHER_DIGEST}


async def test_requests_prefer_the_engine_that_holds_their_adapter(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=3, resident_on={1: {DIGEST}}) as rig:
        for _ in range(5):
            await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=text_request(adapter="poet")))

        assert [len(engine.submits) for engine in rig.engines] == [0, 5, 0]
        card = (await rig.stub.GetModel(gateway_pb2.GetModelRequest(name="poet"))).model
        assert card.num_engines_resident == 1


async def test_a_waiting_request_has_its_adapter_fetched_already(valkey_url: str) -> None:
    async with running_gateway(valkey_url, max_concurrent_requests=1) as rig:
        rig.engine.hold_at = 1
        running = rig.stub.Generate(text_request())
        await running.read()
        waiting = rig.stub.Generate(text_request(adapter="poet"))
        waiting_task = asyncio.ensure_future(waiting.read())

        await eventually(lambda: rig.store.prefetched == [(DIGEST, rig.engine.engine_id)])

        assert len(rig.engine.submits) == 1
        waiting_task.cancel()
        running.cancel()


async def test_time_limit_and_progress_of_the_load_are_passed_on(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.finish = gateway_pb2.FINISH_REASON_TIME_LIMIT
        rig.engine.loading_first = True
        events = [r async for r in rig.stub.Generate(text_request(adapter="poet", progress_events=True))]

        kinds = [event.WhichOneof("event") for event in events]
        assert kinds[:3] == ["accepted", "adapter_loading", "started"]
        assert events[1].adapter_loading.bytes_total == 100
        assert events[-1].finished.finish_reason == gateway_pb2.FINISH_REASON_TIME_LIMIT
        silent = [r.WhichOneof("event") async for r in rig.stub.Generate(text_request(adapter="poet"))]
        assert silent[0] == "started"


async def test_the_models_own_sampling_defaults_fill_what_is_unset(valkey_url: str, tmp_path: Path) -> None:
    generation = {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.05}
    directory = write_base_model(tmp_path / "opinionated", TinyBase(generation=generation))
    base = load_base_model(directory)
    async with running_gateway(valkey_url, model=(directory,), base=base) as rig:
        await rig.stub.GenerateOnce(
            gateway_pb2.GenerateOnceRequest(
                request=text_request(sampling=gateway_pb2.SamplingParams(top_k=3, temperature=0))
            )
        )

        sampling = rig.engine.submits[0].sampling
        assert (sampling.temperature, sampling.top_k) == (0, 3)
        assert sampling.top_p == pytest.approx(0.9)
        assert sampling.repetition_penalty == pytest.approx(1.05)
        assert not sampling.HasField("min_p")


async def test_a_gateway_of_two_base_models_asks_which(valkey_url: str, tmp_path: Path) -> None:
    second = write_base_model(tmp_path / "second", TinyBase(seed=1, hidden_size=32, head_dim=8))
    async with running_gateway(valkey_url, model=(model_directory(), second)) as rig:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=text_request()))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "second, tiny" in (caught.value.details() or "") or "tiny, second" in (caught.value.details() or "")

        named = await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=text_request(model="tiny")))
        by_adapter = await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=text_request(adapter="poet")))
        assert named.finished.usage.output_tokens == by_adapter.finished.usage.output_tokens == 8
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.GenerateOnce(
                gateway_pb2.GenerateOnceRequest(request=text_request(adapter="poet", model="second"))
            )
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
