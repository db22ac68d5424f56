"""Reads untrusted bodies over HTTP: what a server says about its body is not believed, and no read is endless.

The hub's library downloads to files and trusts what the server says. Here, bytes are counted as they arrive and taken
out of the imports' room; a body that stalls or has no end is given up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import httpx2
from loraplex_common.errors import AdapterCorruptUploadError, StoreUnavailableError
from loraplex_common.version import package_version

from loraplex_adapter_store.imports.pace import Pace, Pause

if TYPE_CHECKING:
    from collections.abc import Iterator

READ_TIMEOUT_S: Final = 30.0
MAX_REDIRECTS: Final = 5
MAX_ERROR_BYTES: Final = 64 * 1024
ATTEMPTS: Final = 3
# Room is taken in steps, as each step costs a turn of the event loop. The first are small: a slow sender holds little.
MIN_STEP_BYTES: Final = 64 * 1024
MAX_STEP_BYTES: Final = 1024 * 1024
_BUSY: Final = (429, 503)
_DROPPED: Final = (httpx2.ReadError, httpx2.RemoteProtocolError)


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """What differs between the servers that bodies come from.

    Attributes:
        client: Returns the client to send requests with; it outlives them.
        raise_for_status: Raises what a failed answer means; its body is cut to `MAX_ERROR_BYTES`.
        accept: The ``Accept`` header of a request.
        patience_s: Longest time in which a request is sent again while the server is too busy for it (429, 503).
    """

    client: Callable[[], httpx2.Client]
    raise_for_status: Callable[[httpx2.Response], None]
    accept: str = "*/*"
    patience_s: float = 0.0


class Download:
    """The download of one body.

    Args:
        url: Address of the body.
        authorization: Header with the credential, if any; not sent to the servers that this one redirects to.
        limit: Most bytes; a longer body is refused.
        take: Waits for memory for that many more bytes; blocks.
        what: Name of the body, for errors.
        protocol: What the server speaks.

    Attributes:
        authorization: The same as the argument; may be changed between two calls of `read`.
    """

    def __init__(
        self,
        url: str,
        authorization: str | None,
        *,
        limit: int,
        take: Callable[[int], None],
        what: str,
        protocol: Protocol,
    ) -> None:
        self.authorization = authorization
        self._url = url
        self._protocol = protocol
        self._limit = limit
        self._take = take
        self._what = what
        self._taken = 0
        self._data = bytearray()

    def read(self) -> bytearray:
        """Return the whole body; blocks. A broken connection is made again, and the rest of the body requested.

        After an error it may be called again, and goes on where it was.

        Raises:
            AdapterCorruptUploadError: If it is longer than allowed, or shorter than announced.
            DeadlineError: If it comes too slowly.
            Exception: What the protocol makes of an answer with an error.
            httpx2.HTTPError: If the server cannot be reached.
            SaturatedError: If there is no memory for the bytes.
            StoreUnavailableError: If the answer is not valid HTTP for this request.
        """
        pace = Pace(self._what)
        for attempt in range(ATTEMPTS):
            try:
                with self._opened() as response:
                    self._read(response, pace)
                return self._data
            except _DROPPED:
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def _read(self, response: httpx2.Response, pace: Pace) -> None:
        announced = response.headers.get("content-length", "")
        total = len(self._data) + int(announced[:20]) if announced.isdecimal() else None
        if total is not None and total > self._limit:
            raise self._too_long(total)
        began_s = time.monotonic()
        for chunk in response.iter_raw():
            pace.came(len(chunk), time.monotonic() - began_s)
            self._add(chunk)
            began_s = time.monotonic()
        if total is not None and len(self._data) != total:
            raise AdapterCorruptUploadError(f"{self._what}: {len(self._data)} bytes have come of {total} announced")

    def _add(self, chunk: bytes) -> None:
        num_bytes = len(self._data) + len(chunk)
        if num_bytes > self._limit:
            raise self._too_long(num_bytes)
        while num_bytes > self._taken:
            step = max(num_bytes - self._taken, min(len(self._data), MAX_STEP_BYTES), MIN_STEP_BYTES)
            step = min(step, self._limit - self._taken)
            self._take(step)
            self._taken += step
        self._data += chunk

    def _too_long(self, num_bytes: int) -> AdapterCorruptUploadError:
        return AdapterCorruptUploadError(
            f"{self._what}: {num_bytes} bytes and more, at most {self._limit} are read (--max-adapter-bytes)"
        )

    @contextmanager
    def _opened(self) -> Iterator[httpx2.Response]:
        """Send the request, follow redirects, and check the head of the answer; bodies of redirects are not read."""
        client = self._protocol.client()
        headers = {"accept-encoding": "identity", "user-agent": f"loraplex/{package_version()}"}
        headers["accept"] = self._protocol.accept
        if self.authorization:
            headers["authorization"] = self.authorization
        if self._data:
            headers["range"] = f"bytes={len(self._data)}-"
        request = client.build_request("GET", self._url, headers=headers, timeout=READ_TIMEOUT_S)
        pause = Pause(self._protocol.patience_s)
        num_redirects = 0
        while num_redirects <= MAX_REDIRECTS:
            response = client.send(request, stream=True, follow_redirects=False)
            try:
                if response.status_code in _BUSY and pause.again(response.headers.get("retry-after", "")):
                    continue
                if response.next_request is None:
                    self._check(response)
                    yield response
                    return
                request, num_redirects = response.next_request, num_redirects + 1
            finally:
                response.close()
        raise StoreUnavailableError(f"{self._what}: too many redirects", retry_after_s=10.0)

    def _check(self, response: httpx2.Response) -> None:
        if response.status_code >= 400:
            self._protocol.raise_for_status(_in_brief(response))
        if response.headers.get("content-encoding", "identity") != "identity":
            raise StoreUnavailableError(
                f"{self._what}: the answer is compressed, although the request did not ask for it"
            )
        if self._data and response.status_code != httpx2.codes.PARTIAL_CONTENT:
            self._data.clear()  # the body begins anew; its room is taken already


def _in_brief(response: httpx2.Response) -> httpx2.Response:
    """Return a failed answer with as much of its body as explains the failure."""
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > MAX_ERROR_BYTES:
            break
    headers = {name: value for name, value in response.headers.items() if name.startswith(("x-", "www-auth"))}
    return httpx2.Response(response.status_code, headers=headers, content=bytes(body), request=response.request)
