"""``python -m loraplex_common.healthcheck HOST:PORT [SERVICE]``: exit code 0 if a server says SERVING.

For container health checks; SERVICE is ``readiness`` if left out. Health takes no API key; a server that asks for client
certificates is shown the service's own.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraplex_common.grpc_server import READINESS

TIMEOUT_S: Final = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckTls:
    """How to speak TLS with the server asked.

    Attributes:
        ca: Authorities to trust, PEM.
        cert: Client certificate, PEM, with ``key``; for servers that ask for one.
        name: What the server's certificate must be for, instead of the host asked.
    """

    ca: Path
    cert: Path | None = None
    key: Path | None = None
    name: str | None = None

    def open(self, target: str) -> grpc.Channel:
        """Open a channel; the caller closes it.

        Raises:
            OSError: If a file cannot be read.
        """
        cert, key = (None if path is None else path.read_bytes() for path in (self.cert, self.key))
        credentials = grpc.ssl_channel_credentials(self.ca.read_bytes(), key, cert)
        options = () if self.name is None else (("grpc.ssl_target_name_override", self.name),)
        return grpc.secure_channel(target, credentials, options=options)


def check(target: str, service: str, *, tls: CheckTls | None = None, timeout_s: float = TIMEOUT_S) -> str | None:
    """Ask a server for its health; return what is wrong, or None if it serves.

    Raises:
        OSError: If a file of ``tls`` cannot be read.
    """
    with grpc.insecure_channel(target) if tls is None else tls.open(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            response = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{target}: {error.code().name}: {error.details()}"
    if response.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return f"{target}: {health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)}"


def main() -> None:
    """Check the server named on the command line."""
    parser = argparse.ArgumentParser(prog="healthcheck", description="Ask a gRPC server whether it serves.")
    parser.add_argument("target", metavar="HOST:PORT")
    parser.add_argument("service", nargs="?", default=READINESS)
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="trust the server by this, PEM; turns TLS on")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="client certificate, PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key, PEM")
    parser.add_argument("--tls-name", metavar="NAME", help="name in the server's certificate (default: its host)")
    options = parser.parse_args()
    if (options.tls_cert is None) != (options.tls_key is None) or (options.tls_cert and not options.tls_ca):
        parser.error("--tls-cert, --tls-key and --tls-ca belong together")
    tls = None
    if options.tls_ca is not None:
        tls = CheckTls(ca=options.tls_ca, cert=options.tls_cert, key=options.tls_key, name=options.tls_name)
    try:
        sys.exit(check(options.target, options.service, tls=tls))
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
