"""The asyncio client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, Unpack

from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_common.errors import LoraplexError

from loraplex_client import _requests, _responses
from loraplex_client._aio.adapters import AsyncAdapters
from loraplex_client._aio.engines import AsyncEngines
from loraplex_client._aio.stream import AsyncGenerateStream
from loraplex_client._errors import translated
from loraplex_client._gateways import Gateways, can_help_elsewhere, is_leaving
from loraplex_client._resume import StreamProgress
from loraplex_client._servers import Credentials, Servers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

    from loraplex_client._requests import ChatMessage, GenerateOptions
    from loraplex_client.events import Completion
    from loraplex_client.resources import Model

T = TypeVar("T")
_Stub: TypeAlias = "gateway_pb2_grpc.GatewayServiceAsyncStub"


class AsyncClient:
    """Generates text through a gateway and manages adapters in a store; asyncio, on one event loop.

    Calls that find no server are retried by gRPC itself (UNAVAILABLE only, until a stream's first message), then by the
    next gateway. What a gateway ends because it goes away is asked for again, where there is one target over another
    connection to it. A stream that has begun goes on through another connection or gateway when its own is lost. All
    failures are `loraplex_common.errors.LoraplexError`.

    Args:
        target: The gateway, ``host:port``; or several, in a sequence or separated by commas: calls take turns. By default
            the profile's, else 127.0.0.1:8500.
        store_target: The adapter store; by default the profile's, else the (first) gateway's host, port 8510.
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
        engines: Drain and undrain engines.
    """

    def __init__(
        self,
        target: str | Sequence[str] | None = None,
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
        self._metadata = servers.gateways[0].metadata
        ways = servers.gateways if len(servers.gateways) > 1 else 2 * servers.gateways
        self._channels = [gateway.open_aio() for gateway in ways]
        stubs: list[_Stub] = [gateway_pb2_grpc.GatewayServiceStub(channel) for channel in self._channels]
        targets = [gateway.target for gateway in servers.gateways]
        self._gateways = Gateways(targets, stubs[: len(targets)], spare=stubs[1] if len(targets) == 1 else None)
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
        request, resumes = _requests.generate_request(options), options.get("resume")
        progress = StreamProgress(
            request,
            timeout_s=options.get("timeout"),
            resumes=resumes is None or resumes,
            owns_id=not options.get("request_id"),
            has_choice=len(self._gateways) > 1,
        )
        return AsyncGenerateStream(self._gateways, progress, self._metadata)

    async def generate_once(self, **options: Unpack[GenerateOptions]) -> Completion:
        """Return the whole result of a generation; arguments as `generate`."""
        request = gateway_pb2.GenerateOnceRequest(request=_requests.generate_request(options))
        timeout = options.get("timeout")
        return _responses.completion(
            await self._call(lambda stub: stub.GenerateOnce(request, timeout=timeout, metadata=self._metadata))
        )

    async def tokenize(
        self,
        *,
        prompt: str | None = None,
        messages: Sequence[ChatMessage] | None = None,
        model: str | None = None,
        adapter: str = "",
        adapters: Sequence[tuple[str, float]] | None = None,
        add_special_tokens: bool | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[int, ...]:
        """Return the token ids of ``prompt`` or ``messages``, as `generate` would use them.

        Args:
            prompt: Text.
            messages: A conversation, rendered through the model's chat template.
            model: Base model; may be left out where the gateway fronts exactly one.
            adapter: ``name``, ``name:label`` or ``name@revision``, whose chat template is used if it brings one.
            adapters: Instead of ``adapter``, as `generate` takes them; weights do not change tokens.
            add_special_tokens: Whether text gets special tokens (BOS). Default true.
            add_generation_prompt: Whether the chat template opens the assistant's turn. Default true.
            continue_final_message: Whether the last assistant turn is continued, not closed.
            chat_template_kwargs: Further variables of the chat template, JSON values.
            tools: Functions that the model is told of, OpenAI's ``tools``.

        Raises:
            InvalidParameterError: If there is not exactly one of prompt and messages.
        """
        request = _requests.tokenize_request(
            prompt=prompt,
            messages=messages,
            model=model,
            adapter=adapter,
            adapters=adapters,
            add_special_tokens=add_special_tokens,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
            tools=tools,
        )
        response = await self._call(lambda stub: stub.Tokenize(request, metadata=self._metadata))
        return tuple(response.token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", adapter: str = "", skip_special_tokens: bool = False
    ) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD.

        Args:
            token_ids: The ids.
            model: Base model; may be left out where the gateway fronts exactly one.
            adapter: ``name``, ``name:label`` or ``name@revision``: tokens that it adds have its text.
            skip_special_tokens: Whether special tokens are left out.
        """
        request = gateway_pb2.DetokenizeRequest(
            model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        if adapter:
            request.adapter = adapter
        response = await self._call(lambda stub: stub.Detokenize(request, metadata=self._metadata))
        return response.text

    async def list_models(self) -> list[Model]:
        """Return the base models, then the adapters the caller may use."""
        models: list[Model] = []
        request = gateway_pb2.ListModelsRequest()
        while True:
            page = await self._call(lambda stub: stub.ListModels(request, metadata=self._metadata))
            models.extend(_responses.model(card) for card in page.models)
            if not page.next_page_token:
                return models
            request.page_token = page.next_page_token

    async def cancel(self, request_id: str) -> bool:
        """End a running request whose stream was lost; False if there was none."""
        request = gateway_pb2.CancelRequestRequest(request_id=request_id)
        response = await self._call(lambda stub: stub.CancelRequest(request, metadata=self._metadata))
        return response.was_running

    async def close(self) -> None:
        """Cancel what runs and close the connections."""
        self._gateways.is_closed = True
        await self.adapters.close()
        for channel in self._channels:
            await channel.close()

    async def _call(self, call: Callable[[_Stub], Awaitable[T]]) -> T:
        """Return what a gateway answers, the next one if the first cannot, or another way to the only one if it goes."""
        gateway = self._gateways.pick()
        has_choice = len(self._gateways) > 1
        for num_left in reversed(range(max(2, len(self._gateways)))):
            try:
                with translated(gateway.target):
                    return await call(gateway.stub)
            except LoraplexError as error:
                can_help = is_leaving(error) or (has_choice and can_help_elsewhere(error))
                if not num_left or not can_help or self._gateways.is_closed:
                    raise
                gateway = self._gateways.after(gateway, error)
        raise AssertionError  # there is a gateway

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
