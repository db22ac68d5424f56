"""A Hugging Face hub on loopback, with the part of its HTTP API that `huggingface_hub` needs to download a snapshot."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator


class HubDouble:
    """One repository at one commit.

    Attributes:
        files: Path -> content.
        token: If set, requests must carry it.
        requests: Requested paths, in order.
        num_sent: Bytes of bodies that clients have read.
    """

    def __init__(self, repo: str, commit: str, files: dict[str, bytes], token: str | None = None) -> None:
        self.repo = repo
        self.commit = commit
        self.files = files
        self.token = token
        self.requests: list[str] = []
        self.url = ""
        self.num_sent = 0

    def parts(self, path: str) -> Iterator[bytes] | None:
        """Return a path's body in chunks, sent without its length; None to use `answer`."""
        return None

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of a GET."""
        self.requests.append(path)
        if self.token is not None and authorization != f"Bearer {self.token}":
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"
        if path.startswith("/api/models/"):
            if not path.startswith(f"/api/models/{self.repo}/"):
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
            return self._tree() if path.endswith(f"/tree/{self.commit}") else self._info(path)
        prefix = f"/{self.repo}/resolve/{self.commit}/"
        if path.startswith(prefix) and path.removeprefix(prefix) in self.files:
            data = self.files[path.removeprefix(prefix)]
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.commit}
            return 200, headers, data
        return 404, {"X-Error-Code": "EntryNotFound"}, b""

    def _tree(self) -> tuple[int, dict[str, str], bytes]:
        files = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in self.files.items()]
        return 200, {"Content-Type": "application/json"}, json.dumps(files).encode()

    def _info(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if not path.endswith((f"/revision/{self.commit}", "/revision/main")):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        siblings = [{"rfilename": name, "size": len(data), "blobId": "0" * 40} for name, data in self.files.items()]
        body = {"_id": "1", "id": self.repo, "modelId": self.repo, "sha": self.commit, "siblings": siblings}
        return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def _ranged(wanted: str | None, status: int, body: bytes) -> tuple[int, bytes]:
    if wanted is None or status != 200:
        return status, body
    return 206, body[int(wanted.removeprefix("bytes=").rstrip("-")) :]


@contextmanager
def running_hub(hub: HubDouble) -> Iterator[HubDouble]:
    """Serve a hub inside the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(with_body=True)

        def do_HEAD(self) -> None:
            self._reply(with_body=False)

        def _reply(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            status, headers, body = hub.answer(path, self.headers.get("Authorization"))
            parts = hub.parts(path)
            status, body = _ranged(self.headers.get("Range"), status, body)
            length = {"Transfer-Encoding": "chunked"} if parts else {"Content-Length": str(len(body))}
            self.send_response(status)
            for name, value in (length | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.close_connection = "Content-Length" in headers  # the length may be wrong
            try:
                for part in (parts or [body]) if with_body else ():
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if parts else part)
                    hub.num_sent += len(part)
                if parts and with_body:
                    self.wfile.write(b"0\r\n\r\n")
            except ConnectionError:  # caused by the client, or by this double
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, name="hub", daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
