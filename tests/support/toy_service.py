"""A service that does nothing but start, print its ready line, and end as told: for tests of the supervisor.

``python -m support.toy_service --port N [--fail] [--stubborn]``
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--metrics-port", type=int, default=0)
    parser.add_argument("--http-port", type=int, default=0)
    parser.add_argument("--fail", action="store_true", help="end before being ready")
    parser.add_argument("--stubborn", action="store_true", help="ignore SIGTERM")
    options, _ = parser.parse_known_args()
    if options.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("toy: starting", file=sys.stderr)
    if options.fail:
        print("toy: cannot go on", file=sys.stderr)
        sys.exit(3)
    with socket.create_server(("127.0.0.1", options.port)) as listener:
        port = listener.getsockname()[1]
        print("unasked for")
        print(f"ready: service=toy grpc=127.0.0.1:{port} metrics=127.0.0.1:1 http=127.0.0.1:{port}", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
