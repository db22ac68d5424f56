"""Opens channels to our servers: keepalive, message limits, TLS, credentials and the one layer of retries."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import grpc

from loraplex_common.grpc_server import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

_RETRY_POLICY: Final = {
    "maxAttempts": 3,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],  # AIP-194: nothing else is safe to repeat
}
# The last matching entry with the most specific name wins. EngineService has none: the gateway reroutes instead, and
# long-lived streams reconnect on their own terms.
_SERVICE_CONFIG: Final = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": "loraplex.v1.GatewayService"}, {"service": "loraplex.v1.AdapterStoreService"}],
            "retryPolicy": _RETRY_POLICY,
        },
        {
            "name": [
                {"service": "loraplex.v1.AdapterStoreService", "method": "AttachEngine"},
                {"service": "loraplex.v1.AdapterStoreService", "method": "WatchAliases"},
            ]
        },
    ],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}
CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A server that restarts should be found again in seconds, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Own connection per channel, so that a pool of channels is a pool of connections.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
)


def _authorized(details: grpc.aio.ClientCallDetails, authorization: str) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata["authorization"] = authorization
    return grpc.aio.ClientCallDetails(
        details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
    )


class _Authorization:
    """Holds the header that its four subclasses add; grpc.aio wants one class per shape of call."""

    def __init__(self, authorization: str) -> None:
        self._authorization = authorization

    async def _call(self, continuation: Callable[..., Awaitable[Any]], details: Any, request: Any) -> Any:
        return await continuation(_authorized(details, self._authorization), request)


class _UnaryUnary(_Authorization, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._call(continuation, client_call_details, request)


class _UnaryStream(_Authorization, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._call(continuation, client_call_details, request)


class _StreamUnary(_Authorization, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._call(continuation, client_call_details, request_iterator)


class _StreamStream(_Authorization, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._call(continuation, client_call_details, request_iterator)


def open_channel(
    target: str,
    *,
    tls_ca: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    api_key: str | None = None,
) -> grpc.aio.Channel:
    """Open a channel; the caller closes it.

    Args:
        target: ``host:port`` or any gRPC name, e.g. ``dns:///engines:8520``.
        tls_ca: Certificates to trust, PEM; turns TLS on.
        tls_cert: Client certificate, PEM, for mutual TLS.
        tls_key: Its private key, PEM.
        api_key: Sent as ``authorization: Bearer KEY`` with every call.

    Raises:
        ValueError: If ``tls_cert`` and ``tls_key`` do not come together, or without ``tls_ca``.
    """
    if (tls_cert is None) != (tls_key is None) or (tls_cert is not None and tls_ca is None):
        raise ValueError("a client certificate needs tls_cert, tls_key and tls_ca")
    interceptors: list[grpc.aio.ClientInterceptor] = []
    if api_key is not None:
        header = f"Bearer {api_key}"
        interceptors = [_UnaryUnary(header), _UnaryStream(header), _StreamUnary(header), _StreamStream(header)]
    if tls_ca is None:
        return grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS, interceptors=interceptors)
    credentials = grpc.ssl_channel_credentials(
        tls_ca.read_bytes(), tls_key.read_bytes() if tls_key else None, tls_cert.read_bytes() if tls_cert else None
    )
    return grpc.aio.secure_channel(target, credentials, options=CHANNEL_OPTIONS, interceptors=interceptors)
