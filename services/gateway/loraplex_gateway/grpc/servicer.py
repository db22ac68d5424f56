"""`GatewayService` over gRPC: convert, call the core, convert back."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_common.auth import current_principal
from loraplex_common.errors import InvalidParameterError, LoraplexError

from loraplex_gateway.grpc import wire
from loraplex_gateway.grpc.writer import ChunkWriter, WholeAnswer
from loraplex_gateway.requests import validation
from loraplex_gateway.requests.stall import StallGuard
from loraplex_gateway.types import ChatPrompt, TextPrompt
from loraplex_gateway.weighted import names_by_field

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from loraplex_gateway.quotas.calls import QuotaCall, TenantQuotas
    from loraplex_gateway.requests.core import GatewayCore
    from loraplex_gateway.requests.listing import ModelListing
    from loraplex_gateway.text.models import ServedModel
    from loraplex_gateway.text.tokenization import Encoded
    from loraplex_gateway.types import Prompt


TRACE_ID_KEY: Final = "x-request-id"


class GatewayServicer(gateway_pb2_grpc.GatewayServiceServicer):
    """Serves text generation.

    Args:
        core: Generates.
        quotas: What tenants may use.
        listing: Lists models and adapters.
        slow_client_s: Longest time that one write to a client may wait.
    """

    def __init__(
        self,
        core: GatewayCore,
        quotas: TenantQuotas,
        listing: ModelListing,
        *,
        slow_client_s: float,
    ) -> None:
        self._slow_client_s = slow_client_s
        self._core = core
        self._quotas = quotas
        self._listing = listing

    async def Generate(
        self, request: gateway_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        """Stream the continuation of one prompt."""
        quota = self._quotas.call(current_principal().name)
        guard = StallGuard(self._slow_client_s)
        writer = ChunkWriter(context, guard)
        events = self._core.generate(
            wire.generation_request(request, is_stream=True, **_trace(context)),
            caller=current_principal(),
            time_left_s=context.time_remaining(),
            quota=quota,
            sink=writer,
        )
        try:
            async for event in events:
                await writer.idle()
                guard.writing()
                yield wire.response(event)
                guard.written()
        except LoraplexError:
            await writer.settled()  # tokens that came before the failure
            raise
        finally:
            await writer.close()
            guard.close()
            _tell_quota(context, quota)
            if guard.has_fired:
                await events.athrow(guard.error())
            await events.aclose()

    async def GenerateOnce(
        self, request: gateway_pb2.GenerateOnceRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> gateway_pb2.GenerateOnceResponse:
        """Return the whole continuation at once."""
        message = request.request
        message.progress_events = False
        quota, answer = self._quotas.call(current_principal().name), WholeAnswer()
        events = self._core.generate(
            wire.generation_request(message, is_stream=False, **_trace(context)),
            caller=current_principal(),
            time_left_s=context.time_remaining(),
            quota=quota,
            sink=answer,
        )
        try:
            async with aclosing(events):
                async for event in events:
                    answer.add(event)
        finally:
            _tell_quota(context, quota)
        return answer.message()

    async def Tokenize(
        self, request: gateway_pb2.TokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> gateway_pb2.TokenizeResponse:
        """Return the token ids that Generate would use."""
        add = request.add_special_tokens if request.HasField("add_special_tokens") else True
        if request.add_special_tokens and request.HasField("messages"):
            raise InvalidParameterError(
                "add_special_tokens goes with text only: the chat template writes the special tokens of messages",
                field="add_special_tokens",
            )
        encoded = await self._encode(request, wire.prompt(request, add_special_tokens=add))
        return gateway_pb2.TokenizeResponse(token_ids=encoded.ids, rendered=encoded.rendered)

    async def CountTokens(
        self, request: gateway_pb2.CountTokensRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> gateway_pb2.CountTokensResponse:
        """Return the length of a prompt."""
        encoded = await self._encode(request, wire.prompt(request))
        return gateway_pb2.CountTokensResponse(num_tokens=len(encoded.ids))

    async def Detokenize(
        self, request: gateway_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> gateway_pb2.DetokenizeResponse:
        """Return the text of token ids."""
        caller = current_principal()
        model = await self._core.voice(request.model, names_by_field(request.adapter, ()), caller=caller)
        token_ids = list(request.token_ids)
        _check_ids(token_ids, model)
        text = await model.tokenizer.decode(
            token_ids, skip_special_tokens=request.skip_special_tokens, tenant=caller.name
        )
        return gateway_pb2.DetokenizeResponse(text=text)

    async def CancelRequest(
        self, request: gateway_pb2.CancelRequestRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> gateway_pb2.CancelRequestResponse:
        """End a running request of the caller's tenant."""
        if not request.request_id:
            raise InvalidParameterError("request_id is empty", field="request_id")
        was_running = await self._core.cancel(current_principal().name, request.request_id)
        return gateway_pb2.CancelRequestResponse(was_running=was_running)

    async def ListModels(
        self, request: gateway_pb2.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> gateway_pb2.ListModelsResponse:
        """Return a page of base models and adapters."""
        cards, token = self._listing.page(
            current_principal(), page_size=request.page_size, page_token=request.page_token
        )
        return gateway_pb2.ListModelsResponse(models=[wire.model_card(card) for card in cards], next_page_token=token)

    async def GetModel(
        self, request: gateway_pb2.GetModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> gateway_pb2.GetModelResponse:
        """Return one base model or adapter."""
        card = await self._listing.get(request.name, current_principal())
        return gateway_pb2.GetModelResponse(model=wire.model_card(card))

    async def _encode(
        self, request: gateway_pb2.TokenizeRequest | gateway_pb2.CountTokensRequest, prompt: Prompt | None
    ) -> Encoded:
        weighted = wire.weighted_adapters(request.adapters)
        validation.check_adapters(request.adapter, weighted)
        adapters = names_by_field(request.adapter, weighted)
        model = await self._core.voice(request.model, adapters, caller=current_principal(), prompt=prompt)
        if not isinstance(prompt, TextPrompt | ChatPrompt):
            raise InvalidParameterError("no prompt: set exactly one of text and messages", field="prompt")
        if isinstance(prompt, ChatPrompt):
            validation.check_prompt(prompt)
        return await self._core.encode(model, prompt, tenant=current_principal().name)


def _check_ids(token_ids: list[int], model: ServedModel) -> None:
    known = model.token_ids
    if (bad := known.first_unknown(token_ids)) is not None:
        raise InvalidParameterError(f"token_ids holds {bad}; token ids of this model are {known}", field="token_ids")


def _tell_quota(context: grpc.aio.ServicerContext[Any, Any], quota: QuotaCall) -> None:
    """Send what the tenant has left with the call's end, whatever that is."""
    if headers := quota.headers:
        context.set_trailing_metadata((*(context.trailing_metadata() or ()), *headers))


def _trace(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    """Return the caller's trace context and trace id, and send the id back, also with an error."""
    metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
    trace_id = metadata.get(TRACE_ID_KEY, "")
    if trace_id:
        context.set_trailing_metadata(((TRACE_ID_KEY, trace_id),))
    return {"traceparent": metadata.get("traceparent", ""), "trace_id": trace_id}
