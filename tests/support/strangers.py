"""Calls to our ports by clients without the right credentials, and the answers to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from loraplex_common.grpc_channel import CHANNEL_OPTIONS

TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """The credentials of a caller; by default it has none.

    Attributes:
        certificate: Folder with the ``tls.crt`` and ``tls.key`` that it shows.
        key: Folder with the ``api-key`` that it sends.
        trusts: Folder with ``ca.crt``; None means plain text.
    """

    trusts: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def ask(self, target: str, method: str, request: Any = None) -> grpc.StatusCode:
        """Call a method once, with an empty message unless ``request`` is given; return the status of the answer.

        A stream counts as answered with OK once its first message has come.
        """
        shape = "stream_stream" if method.endswith(("/Session", "/AttachEngine")) else "unary_stream"
        payload = b"" if request is None else request.SerializeToString()
        metadata = []
        if self.key is not None:
            metadata.append(("authorization", f"Bearer {(self.key / 'api-key').read_text().strip()}"))
        with self._channel(target) as channel:
            call = getattr(channel, shape)(method)(
                iter([payload]) if shape == "stream_stream" else payload, timeout=TIMEOUT_S, metadata=metadata
            )
            try:
                next(call, None)
            except grpc.RpcError as error:
                code: grpc.StatusCode = error.code()
                return code
            finally:
                call.cancel()
        return grpc.StatusCode.OK

    def _channel(self, target: str) -> grpc.Channel:
        options = [*CHANNEL_OPTIONS, ("grpc.enable_retries", 0)]
        if self.trusts is None:
            return grpc.insecure_channel(target, options=options)
        key, certificate = (
            (None, None)
            if self.certificate is None
            else ((self.certificate / name).read_bytes() for name in ("tls.key", "tls.crt"))
        )
        credentials = grpc.ssl_channel_credentials((self.trusts / "ca.crt").read_bytes(), key, certificate)
        return grpc.secure_channel(target, credentials, options=options)
