"""The asyncio client; `_client` has the explanations."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import grpc
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_common.errors import StreamInterruptedError

from loraplex_client import _requests, _responses
from loraplex_client._aio_adapters import AsyncAdapters
from loraplex_client._engine_operations import AsyncEngines
from loraplex_client._errors import loraplex_error, translated
from loraplex_client._servers import Credentials, Servers
from loraplex_client.events import Completion, Event, Finished

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_client._requests import ChatMessage, GenerateOptions
    from loraplex_client.resources import Model


class AsyncGenerateStream(AsyncIterator[Event]):
    """The events of one generation, in order; the last is `Finished`.

    Leaving it early (``aclose``, the end of an ``async with`` block, cancelling the task that reads it, or dropping
    it) cancels the request, which frees all that the engine holds for it.

    Attributes:
        request_id: The request's id, for `AsyncClient.cancel`.
    """

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[gateway_pb2.GenerateRequest, gateway_pb2.GenerateResponse],
        request_id: str,
        target: str,
    ) -> None:
        self.request_id = request_id
        self._call = call
        self._target = target
        self._is_over = False

    async def __anext__(self) -> Event:
        """Return the next event.

        Raises:
            LoraplexError: If the request failed.
        """
        while not self._is_over:
            try:
                response = await self._call.read()
            except grpc.RpcError as error:
                self._is_over = True
                raise loraplex_error(error, self._target) from error
            if isinstance(response, gateway_pb2.GenerateResponse):
                event = _responses.event(response)
            else:  # the end-of-stream mark
                self._is_over = True
                raise StreamInterruptedError("the stream ended without a final event")
            if isinstance(event, Finished):
                self._is_over = True
            if event is not None:
                return event
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the request if it still runs."""
        self._is_over = True
        self._call.cancel()

    async def __aenter__(self) -> AsyncGenerateStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class AsyncClient:
    """Generates text through a gateway and manages adapters in a store; asyncio, on one event loop.

    Calls that find no server are retried by gRPC itself (UNAVAILABLE only, until a stream's first message). All
    failures are `loraplex_common.errors.LoraplexError`.

    Args:
        target: The gateway, ``host:port``; by default the profile's, else 127.0.0.1:8500.
        store_target: The adapter store; by default the profile's, else the gateway's host, port 8510.
        tls_ca: Certificates to trust, PEM; turns TLS on.
        tls_cert: Client certificate, PEM, for mutual TLS; together with ``tls_key``.
        api_key: Sent with every call.
        profile: File that says where the servers are and what to prove oneself with, where the arguments above do not:
            ``admin/profile.json`` of ``loraplex credentials make``. Without one, that of a ``loraplex serve`` of the same
            user at ``target`` is used.

    Raises:
        ProfileError: If a profile cannot be used.

    Attributes:
        adapters: Import, list, alias, delete adapters.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        store_target: str | None = None,
        tls_ca: Path | None = None,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
        api_key: str | None = None,
        profile: Path | None = None,
    ) -> None:
        servers = Servers(
            target,
            store_target,
            credentials=Credentials(api_key=api_key, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key),
            profile=profile,
        )
        connection = servers.gateway
        self._target = connection.target
        self._metadata = connection.metadata
        self._channel = connection.open_aio()
        self._stub: gateway_pb2_grpc.GatewayServiceAsyncStub = gateway_pb2_grpc.GatewayServiceStub(self._channel)
        self.adapters = AsyncAdapters(servers.store)
        self.engines = AsyncEngines(servers.engine)

    def generate(self, **options: Unpack[GenerateOptions]) -> AsyncGenerateStream:
        """Start a generation and return its events; see `GenerateOptions` for the arguments.

        Example::

            async for event in client.generate(prompt="Once upon a time", adapter="kjv", max_new_tokens=64):
                print(event.text, end="", flush=True)

        Raises:
            InvalidParameterError: If there is not exactly one prompt, or a value does not fit its type.
        """
        request = _requests.generate_request(options)
        call = self._stub.Generate(request, timeout=options.get("timeout"), metadata=self._metadata)
        return AsyncGenerateStream(call, request.request_id, self._target)

    async def generate_once(self, **options: Unpack[GenerateOptions]) -> Completion:
        """Return the whole result of a generation; arguments as `generate`."""
        request = gateway_pb2.GenerateOnceRequest(request=_requests.generate_request(options))
        with translated(self._target):
            return _responses.completion(
                await self._stub.GenerateOnce(request, timeout=options.get("timeout"), metadata=self._metadata)
            )

    async def tokenize(
        self,
        *,
        prompt: str | None = None,
        messages: Sequence[ChatMessage] | None = None,
        model: str | None = None,
        add_special_tokens: bool | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Return the token ids of ``prompt`` or ``messages``, as `generate` would use them.

        Args:
            prompt: Text.
            messages: A conversation, rendered through the model's chat template.
            model: Base model; may be left out where the gateway fronts exactly one.
            add_special_tokens: Whether text gets special tokens (BOS). Default true.
            add_generation_prompt: Whether the chat template opens the assistant's turn. Default true.
            continue_final_message: Whether the last assistant turn is continued, not closed.
            chat_template_kwargs: Further variables of the chat template, JSON values.

        Raises:
            InvalidParameterError: If there is not exactly one of prompt and messages.
        """
        request = _requests.tokenize_request(
            prompt=prompt,
            messages=messages,
            model=model,
            add_special_tokens=add_special_tokens,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        with translated(self._target):
            return tuple((await self._stub.Tokenize(request, metadata=self._metadata)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool = False) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD."""
        request = gateway_pb2.DetokenizeRequest(
            model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        with translated(self._target):
            return (await self._stub.Detokenize(request, metadata=self._metadata)).text

    async def list_models(self) -> list[Model]:
        """Return the base models, then the adapters the caller may use."""
        models: list[Model] = []
        request = gateway_pb2.ListModelsRequest()
        while True:
            with translated(self._target):
                page = await self._stub.ListModels(request, metadata=self._metadata)
            models.extend(_responses.model(card) for card in page.models)
            if not page.next_page_token:
                return models
            request.page_token = page.next_page_token

    async def cancel(self, request_id: str) -> bool:
        """End a running request whose stream was lost; False if there was none."""
        request = gateway_pb2.CancelRequestRequest(request_id=request_id)
        with translated(self._target):
            return (await self._stub.CancelRequest(request, metadata=self._metadata)).was_running

    async def close(self) -> None:
        """Cancel what runs and close the connections."""
        await self.adapters.close()
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
