"""``python -m loraplex_common.healthcheck HOST:PORT [SERVICE]``: exit code 0 if a server says SERVING.

For container health checks; SERVICE is ``readiness`` if left out.
"""

from __future__ import annotations

import argparse
import sys
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraplex_common.grpc_server import READINESS

TIMEOUT_S: Final = 3.0


def check(target: str, service: str, *, timeout_s: float = TIMEOUT_S) -> str | None:
    """Ask a server for its health; return what is wrong, or None if it serves."""
    with grpc.insecure_channel(target) as channel:
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
    options = parser.parse_args()
    sys.exit(check(options.target, options.service))


if __name__ == "__main__":
    main()
