"""``python -m loraplex_common.healthcheck HOST:PORT [SERVICE]``: exit code 0 if a server says SERVING.

For container health checks; SERVICE is ``readiness`` if left out. ``--tls-ca`` is for a server with TLS, ``--tls-cert``
and ``--tls-key`` for one that also requires client certificates; ``--tls-name`` is the name in its certificate if that
is not the host dialled. Each is also a variable, ``LORAPLEX_HEALTHCHECK_TLS_CA`` and so on. No key is needed.
"""

from __future__ import annotations

import argparse
import os
import ssl
import sys
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraplex_common.health_names import READINESS
from loraplex_common.tls_files import TlsFiles

TIMEOUT_S: Final = 10.0
"""A machine that is busy to the full answers late, and is not ill; the images' own limit is longer."""


def check(
    target: str, service: str, *, tls: TlsFiles | None = None, tls_name: str | None = None, timeout_s: float = TIMEOUT_S
) -> str | None:
    """Ask a server for its health; return what is wrong, or None if it serves.

    Raises:
        OSError: If a TLS file cannot be used.
    """
    with _open(target, tls, tls_name) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            response = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{target}: {error.code().name}: {error.details()}"
    if response.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return f"{target}: {health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)}"


def _open(target: str, tls: TlsFiles | None, tls_name: str | None) -> grpc.Channel:
    if tls is None:
        return grpc.insecure_channel(target)
    credentials = tls.contents(ssl.Purpose.SERVER_AUTH).channel_credentials()
    return grpc.secure_channel(
        target, credentials, options=() if tls_name is None else (("grpc.ssl_target_name_override", tls_name),)
    )


def main() -> None:
    """Check the server named on the command line."""
    parser = argparse.ArgumentParser(prog="healthcheck", description="Ask a gRPC server whether it serves.")
    parser.add_argument("target", metavar="HOST:PORT")
    parser.add_argument("service", nargs="?", default=READINESS)
    for name, kind, help in (
        ("ca", Path, "trust the server's certificate by this, PEM; turns TLS on"),
        ("cert", Path, "client certificate, PEM"),
        ("key", Path, "its private key, PEM"),
        ("name", str, "name in the server's certificate (default: the host dialled)"),
    ):
        given = os.environ.get(f"LORAPLEX_HEALTHCHECK_TLS_{name.upper()}")
        metavar = "NAME" if kind is str else "FILE"
        parser.add_argument(f"--tls-{name}", type=kind, default=given and kind(given), metavar=metavar, help=help)
    options = parser.parse_args()
    tls = TlsFiles(ca=options.tls_ca, cert=options.tls_cert, key=options.tls_key) if options.tls_ca else None
    try:
        sys.exit(check(options.target, options.service, tls=tls, tls_name=options.tls_name))
    except OSError as error:
        sys.exit(f"{options.target}: {error}")


if __name__ == "__main__":
    main()
