"""Requests that would go on in another protocol are served in HTTP/1.1, as a server may that knows no other.

Java's `HttpClient` asks for HTTP/2 (`Upgrade: h2c`) with the first request of a connection. httptools stops behind the
header of such a request and would take its body for the next one.

Source: RFC 9110, section 7.8: "A server MAY ignore a received Upgrade header field".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import httptools

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_ASKING: Final = frozenset({b"upgrade", b"http2-settings"})


class PlainParser:
    """httptools' parser for a protocol that never upgrades: it reads a request that asks for it again without its wish.

    Args:
        protocol: Has the callbacks; those for the end of a header and of a request do nothing while `asks_to_upgrade`.
    """

    def __init__(self, protocol: HttpToolsProtocol) -> None:
        self._protocol = protocol
        self._parser = _new_parser(protocol)

    @property
    def asks_to_upgrade(self) -> bool:
        """Whether the request whose header has just ended will be read again."""
        return self._parser.should_upgrade()

    def should_upgrade(self) -> bool:
        """Return False: what is served goes on in HTTP/1.1."""
        return False

    def should_keep_alive(self) -> bool:
        """Return whether the request lets the connection stay."""
        return self._parser.should_keep_alive()

    def get_method(self) -> bytes:
        """Return the request's method."""
        return self._parser.get_method()

    def get_http_version(self) -> str:
        """Return the request's version, such as ``1.1``."""
        return self._parser.get_http_version()

    def feed_data(self, data: bytes) -> None:
        """Parse what has come.

        Raises:
            httptools.HttpParserError: If it is malformed, or asks for a tunnel.
        """
        while data:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if self.get_method() == b"CONNECT":
                    raise httptools.HttpParserError("this is no proxy") from None
                data = self._head() + data[upgrade.args[0] :]
                self._parser = _new_parser(self._protocol)
            else:
                return

    def _head(self) -> bytes:
        """Return the header of the request without what asks for another protocol."""
        protocol = self._protocol
        lines = [b"%b %b HTTP/%b" % (self.get_method(), protocol.url, self.get_http_version().encode())]
        for name, value in protocol.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                lines.append(b"connection: " + b", ".join(token for token in tokens if token.lower() not in _ASKING))
            elif name not in _ASKING:
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join([*lines, b"", b""])


def _new_parser(protocol: HttpToolsProtocol) -> httptools.HttpRequestParser:
    parser = httptools.HttpRequestParser(protocol)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
    return parser
