"""The certificate that a request's client has shown, as gRPC tells of one."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.auth import Certificate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import Scope

STATE: Final = "loraplex_certificate"  # of a request's scope
# The kinds of alternative names that gRPC tells of.
_ADDRESS: Final = "IP Address"
_NAMES: Final = ("DNS", "URI", "email", _ADDRESS)


def certificate_of(scope: Scope) -> Certificate | None:
    """Return the names in the certificate that a request's client has shown; None if TLS verified none."""
    certificate = scope.get("state", {}).get(STATE)
    return certificate if isinstance(certificate, Certificate) else None


def read_certificate(peer: Mapping[str, Any] | None) -> Certificate | None:
    """Return the names in what `ssl.SSLSocket.getpeercert` says, as gRPC has them."""
    if not peer:
        return None
    subject = (pair for relative_name in peer.get("subject", ()) for pair in relative_name)
    common_name = next((value for key, value in subject if key == "commonName"), "")
    alternatives = [(kind, name) for kind, name in peer.get("subjectAltName", ()) if kind in _NAMES]
    names = tuple(_shortened(name) if kind == _ADDRESS else name for kind, name in alternatives)
    return Certificate(common_name=common_name, alternative_names=names)


def _shortened(address: str) -> str:
    """Return an address as it is written everywhere else; OpenSSL has ``2001:DB8:0:0:0:0:0:7``."""
    try:
        return str(ipaddress.ip_address(address.strip()))
    except ValueError:
        return address  # of no known length: OpenSSL says so in words, which name no client
