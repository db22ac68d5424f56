"""Reads untrusted bodies over HTTP: what a server says about its body is not believed, and no read is endless.

The hub's library downloads to files and trusts what the server says. Here, bytes are counted as they arrive and taken
out of the imports' room; a body that stalls or has no end is given up.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import httpx2
from huggingface_hub import get_session, hf_raise_for_status
from loraplex_common.errors import AdapterCorruptUploadError, StoreUnavailableError
from loraplex_common.version import package_version

from loraplex_adapter_store.imports.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READ_TIMEOUT_S: Final = 30.0
MAX_REDIRECTS: Final = 5
MAX_ERROR_BYTES: Final = 64 * 1024
ATTEMPTS: Final = 3
# Room is taken in steps, as each step costs a turn of the event loop. The first are small: a slow sender holds little.
MIN_STEP_BYTES: Final = 64 * 1024
MAX_STEP_BYTES: Final = 1024 * 1024
_DROPPED: Final = (httpx2.ReadError, httpx2.RemoteProtocolError)


class Download:
    """The download of one body.

    Args:
        url: Address of the body.
        token: Credential, if any; not sent to the servers that this one redirects to.
        limit: Most bytes; a longer body is refused.
        take: Waits for memory for that many more bytes; blocks.
        what: Name of the body, for errors.
    """

    def __init__(self, url: str, token: str | None, *, limit: int, take: Callable[[int], None], what: str) -> None:
        self._url = url
        self._token = token
        self._limit = limit
        self._take = take
        self._what = what
        self._taken = 0
        self._data = bytearray()

    def read(self) -> bytearray:
        """Return the whole body; blocks. A broken connection is made again, and the rest of the body requested.

        Raises:
            AdapterCorruptUploadError: If it is longer than allowed, or shorter than announced.
            DeadlineError: If it comes too slowly.
            HfHubHTTPError: If the hub answers with an error.
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
        client = get_session()
        headers = {"accept-encoding": "identity", "user-agent": f"loraplex/{package_version()}"}
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        if self._data:
            headers["range"] = f"bytes={len(self._data)}-"
        request = client.build_request("GET", self._url, headers=headers, timeout=READ_TIMEOUT_S)
        for _ in range(MAX_REDIRECTS + 1):
            response = client.send(request, stream=True, follow_redirects=False)
            try:
                if response.next_request is None:
                    self._check(response)
                    yield response
                    return
                request = response.next_request
            finally:
                response.close()
        raise StoreUnavailableError(f"{self._what}: too many redirects", retry_after_s=10.0)

    def _check(self, response: httpx2.Response) -> None:
        if response.status_code >= 400:
            hf_raise_for_status(_in_brief(response))
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
    headers = {name: value for name, value in response.headers.items() if name.startswith("x-")}
    return httpx2.Response(response.status_code, headers=headers, content=bytes(body), request=response.request)
