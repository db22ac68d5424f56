"""Opens channels to our servers: keepalive, message limits, TLS, credentials and the one layer of retries."""

from __future__ import annotations

import json
import ssl
from typing import TYPE_CHECKING, Any, Final

import grpc

from loraplex_common.grpc_server import MAX_MESSAGE_BYTES
from loraplex_common.secret import Secret
from loraplex_common.tls_files import TlsFiles

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

_RETRY_POLICY: Final = {
    "maxAttempts": 3,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],  # AIP-194: only this is safe to repeat
}
# The last matching entry with the most specific name is used. EngineService has none: the gateway reroutes instead, and
# long-lived streams reconnect by themselves. Nor have calls that send a stream: gRPC's core aborts the process ("Check failed:
# pending == nullptr", "ILLEGAL STATE: FORWARDED_BATCH") if their connection is lost while it keeps messages for a retry.
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
                {"service": "loraplex.v1.AdapterStoreService", "method": "UploadAdapter"},
                {"service": "loraplex.v1.AdapterStoreService", "method": "PushAdapter"},
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
    # A server that restarts should be found again within seconds, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Each channel has its own connection, so that a pool of channels is a pool of connections.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
)


def _authorized(details: grpc.aio.ClientCallDetails, key: Secret) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata["authorization"] = f"Bearer {key.reveal()}"
    return grpc.aio.ClientCallDetails(
        details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
    )


class _Authorization:
    """Holds the key that its four subclasses send; grpc.aio wants one class per shape of call."""

    def __init__(self, key: Secret) -> None:
        self._key = key

    async def _call(self, continuation: Callable[..., Awaitable[Any]], details: Any, request: Any) -> Any:
        return await continuation(_authorized(details, self._key), request)


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
    tls_name: str | None = None,
    api_key: str | Secret | None = None,
) -> grpc.aio.Channel:
    """Open a channel; the caller closes it.

    Args:
        target: ``host:port`` or any gRPC name, e.g. ``dns:///engines:8520``.
        tls_ca: Certificates to trust, PEM; turns TLS on.
        tls_cert: Client certificate, PEM, for mutual TLS.
        tls_key: Its private key, PEM.
        tls_name: Name that the server's certificate must have, instead of the host in ``target``.
        api_key: Sent as ``authorization: Bearer KEY`` with every call, in its present value.

    Raises:
        ValueError: If ``tls_cert`` and ``tls_key`` are not given together, or without ``tls_ca``.
        OSError: If a file cannot be used.
    """
    if (tls_cert is None) != (tls_key is None) or (tls_cert is not None and tls_ca is None):
        raise ValueError("a client certificate needs tls_cert, tls_key and tls_ca")
    credentials: grpc.ChannelCredentials | None = None
    if tls_ca is not None:
        files = TlsFiles(cert=tls_cert, key=tls_key, ca=tls_ca)
        credentials = files.contents(ssl.Purpose.SERVER_AUTH).channel_credentials()
    key = Secret(api_key) if isinstance(api_key, str) else api_key
    return make_channel(target, credentials, tls_name=tls_name, key=key)


def make_channel(
    target: str, credentials: grpc.ChannelCredentials | None, *, tls_name: str | None, key: Secret | None
) -> grpc.aio.Channel:
    """Open a channel; the caller closes it. ``credentials`` None means plain text; otherwise like `open_channel`."""
    interceptors: list[grpc.aio.ClientInterceptor] = []
    if key is not None:
        interceptors = [_UnaryUnary(key), _UnaryStream(key), _StreamUnary(key), _StreamStream(key)]
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS, interceptors=interceptors)
    named = () if tls_name is None else (("grpc.ssl_target_name_override", tls_name),)
    return grpc.aio.secure_channel(target, credentials, options=(*CHANNEL_OPTIONS, *named), interceptors=interceptors)
