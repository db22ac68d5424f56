"""Object storage for tests: moto's server on loopback, in threads of this process, behind a proxy that makes faults."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx2
import obstore
from moto.server import ThreadedMotoServer
from obstore.store import S3Store
from support.fault_proxy import FaultProxy, running_proxy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

BUCKET = "adapters"
KEYS = ("access", "secret")


class ObjectStorage:
    """A bucket.

    Attributes:
        proxy: What clients go through.
    """

    def __init__(self, url: str, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self._direct = _store(url)

    @property
    def url(self) -> str:
        """The bucket's name with its endpoint, as flags take it."""
        return f"s3://{BUCKET}?endpoint={self.proxy.url}&region=us-east-1"

    def url_below(self, prefix: str, **options: str) -> str:
        """The same of a folder, with further options."""
        more = "".join(f"&{name}={value}" for name, value in options.items())
        return f"s3://{BUCKET}/{prefix}?endpoint={self.proxy.url}&region=us-east-1{more}"

    def put(self, folder: str, files: Mapping[str, bytes]) -> None:
        """Write objects."""
        for name, data in files.items():
            obstore.put(self._direct, f"{folder}/{name}", bytes(data))

    def names(self, folder: str = "") -> list[str]:
        """Return the paths of the objects in a folder."""
        return sorted(meta["path"] for page in obstore.list(self._direct, folder or None) for meta in page)

    def delete(self, path: str) -> None:
        """Delete an object."""
        obstore.delete(self._direct, path)


@contextmanager
def running_storage() -> Iterator[ObjectStorage]:
    """Serve an empty bucket inside the block."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        httpx2.put(f"{url}/{BUCKET}").raise_for_status()
        with running_proxy(url) as proxy:
            yield ObjectStorage(url, proxy)
    finally:
        server.stop()


def _store(url: str) -> S3Store:
    config = {"endpoint": url, "region": "us-east-1", "access_key_id": KEYS[0], "secret_access_key": KEYS[1]}
    return S3Store(BUCKET, config=config, client_options={"allow_http": True})  # type: ignore[arg-type]
