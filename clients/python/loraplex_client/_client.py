"""The blocking client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import grpc
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_common.errors import StreamInterruptedError

from loraplex_client import _requests, _responses
from loraplex_client._adapters import Adapters
from loraplex_client._engine_operations import Engines
from loraplex_client._errors import loraplex_error, translated
from loraplex_client._servers import Credentials, Servers
from loraplex_client.events import Completion, Event, Finished

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_client._requests import ChatMessage, GenerateOptions
    from loraplex_client.resources import Model


class GenerateStream(Iterator[Event]):
    """The events of one generation, in order; the last is `Finished`.

    Leaving it early (``close``, the end of a ``with`` block, or dropping it) cancels the request, which frees all that
    the engine holds for it.

    Attributes:
        request_id: The request's id, for `Client.cancel`.
    """

    def __init__(self, call: grpc._CallIterator[gateway_pb2.GenerateResponse], request_id: str, target: str) -> None:
        self.request_id = request_id
        self._call = call
        self._target = target
        self._is_over = False

    def __next__(self) -> Event:
        """Return the next event.

        Raises:
            LoraplexError: If the request failed.
        """
        while not self._is_over:
            try:
                event = _responses.event(next(self._call))
            except StopIteration:
                self._is_over = True
                raise StreamInterruptedError("the stream ended without a final event") from None
            except grpc.RpcError as error:
                if self._is_over:  # closed by another thread while this one waited
                    break
                self._is_over = True
                raise loraplex_error(error, self._target) from error
            if isinstance(event, Finished):
                self._is_over = True
            if event is not None:
                return event
        raise StopIteration

    def close(self) -> None:
        """Cancel the request if it still runs."""
        self._is_over = True
        self._call.cancel()

    def __enter__(self) -> GenerateStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._call.cancel()


class Client:
    """Generates text through a gateway and manages adapters in a store; blocking, safe to share between threads.

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
        engines: Drain and undrain engines.
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
        self._channel = connection.open()
        self._stub = gateway_pb2_grpc.GatewayServiceStub(self._channel)
        self.adapters = Adapters(servers.store)
        self.engines = Engines(servers.engine)

    def generate(self, **options: Unpack[GenerateOptions]) -> GenerateStream:
        """Start a generation and return its events; see `GenerateOptions` for the arguments.

        Example::

            for event in client.generate(prompt="Once upon a time", adapter="kjv", max_new_tokens=64):
                print(event.text, end="", flush=True)

        Raises:
            InvalidParameterError: If there is not exactly one prompt, or a value does not fit its type.
        """
        request = _requests.generate_request(options)
        call = self._stub.Generate(request, timeout=options.get("timeout"), metadata=self._metadata)
        return GenerateStream(call, request.request_id, self._target)

    def generate_once(self, **options: Unpack[GenerateOptions]) -> Completion:
        """Return the whole result of a generation; arguments as `generate`."""
        request = gateway_pb2.GenerateOnceRequest(request=_requests.generate_request(options))
        with translated(self._target):
            return _responses.completion(
                self._stub.GenerateOnce(request, timeout=options.get("timeout"), metadata=self._metadata)
            )

    def tokenize(
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
            return tuple(self._stub.Tokenize(request, metadata=self._metadata).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool = False) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD."""
        request = gateway_pb2.DetokenizeRequest(
            model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        with translated(self._target):
            return self._stub.Detokenize(request, metadata=self._metadata).text

    def list_models(self) -> list[Model]:
        """Return the base models, then the adapters the caller may use."""
        models: list[Model] = []
        request = gateway_pb2.ListModelsRequest()
        while True:
            with translated(self._target):
                page = self._stub.ListModels(request, metadata=self._metadata)
            models.extend(_responses.model(card) for card in page.models)
            if not page.next_page_token:
                return models
            request.page_token = page.next_page_token

    def cancel(self, request_id: str) -> bool:
        """End a running request whose stream was lost; False if there was none."""
        request = gateway_pb2.CancelRequestRequest(request_id=request_id)
        with translated(self._target):
            return self._stub.CancelRequest(request, metadata=self._metadata).was_running

    def close(self) -> None:
        """Cancel what runs and close the connections."""
        self.adapters.close()
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
