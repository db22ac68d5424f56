"""TLS in front of a unix socket, as stunnel does it: our Valkey's wheel is built without TLS."""

from __future__ import annotations

import asyncio
import ssl
import threading
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from support.certificates import Issued


@asynccontextmanager
async def tls_proxy(address: str, cert: Issued, client_ca: Path, *, port: int = 0) -> AsyncIterator[int]:
    """Serve a ``unix://`` address over TLS to clients with a certificate of an authority; give out the port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=client_ca)
    context.load_cert_chain(cert.cert, cert.key)
    context.verify_mode = ssl.CERT_REQUIRED
    writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind_reader, behind_writer = await asyncio.open_unix_connection(address.removeprefix("unix://"))
        writers.update((writer, behind_writer))
        await asyncio.gather(_copy(reader, behind_writer), _copy(behind_reader, writer))
        writers.difference_update((writer, behind_writer))

    server = await asyncio.start_server(serve, "127.0.0.1", port, ssl=context)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for writer in tuple(writers):
            writer.transport.abort()


@contextmanager
def tls_proxy_thread(address: str, cert: Issued, client_ca: Path) -> Iterator[int]:
    """Do the same for tests whose own event loop comes and goes: in a thread that ends with the block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="tls-proxy", daemon=True)
    thread.start()
    proxy = tls_proxy(address, cert, client_ca)
    try:
        yield asyncio.run_coroutine_threadsafe(proxy.__aenter__(), loop).result(10)
        asyncio.run_coroutine_threadsafe(proxy.__aexit__(None, None, None), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:  # one side has gone
        pass
    finally:
        writer.transport.abort()
