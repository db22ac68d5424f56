"""Settings that all services share: which callers are let in, and credentials towards other services and Valkey."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit

from loraplex_common import sentinel_url
from loraplex_common.grpc_server import ServerConfig
from loraplex_common.peer_targets import check_targets
from loraplex_common.peers import PeerIdentity, Peers
from loraplex_common.secret import HIDDEN, Secret
from loraplex_common.sentinel_url import SentinelUrl
from loraplex_common.settings import secret, setting
from loraplex_common.tls_files import TlsFiles

if TYPE_CHECKING:
    from loraplex_common.valkey import TranslatingClient

OTLP_ENDPOINT: Final = re.compile(r"https?://[^/@\s]+:\d{1,5}/?")
TLS_SCHEMES: Final = ("rediss", sentinel_url.TLS_SCHEME)
SCHEMES: Final = ("redis", sentinel_url.SCHEME, *TLS_SCHEMES)


def valkey_url(*default: str | None, help: str) -> Any:
    """Declare a field with the URL of Valkey. Its password may come from the environment, never from a command line."""
    return setting(*default, help=help, parse=whole_url, parse_flag=without_password, show=hide_password, metavar="URL")


def whole_url(url: str) -> str:
    """Return a URL whose password, if it has one, is in the usual place.

    Raises:
        ValueError: If characters in it end the host, so that the rest would be read as a path, or it names Sentinels
            in another form than theirs; the URL is not quoted.
    """
    parts = urlsplit(url)
    if parts.scheme in SCHEMES and "@" in parts.path + parts.query + parts.fragment:
        raise ValueError("'/', '?' and '#' in a user or password are written %2F, %3F and %23 in a URL")
    SentinelUrl.parse(url)
    return url


def without_password(url: str) -> str:
    """Return a URL without secrets.

    Raises:
        ValueError: If it has a password; the password is not quoted.
    """
    parts = urlsplit(whole_url(url))
    if parts.password is not None or "password" in parse_qs(parts.query, keep_blank_values=True):
        raise ValueError("a command line is for everybody to read: give the password with --redis-password-file")
    return url


def hide_password(url: str) -> str:
    """Return a URL in a form that may be logged."""
    password = urlsplit(url).password
    hidden = url if not password else url.replace(f":{password}@", f":{HIDDEN}@", 1)
    before, mark, query = hidden.partition("?")
    kept, name, _ = query.partition("password=")
    if "password" in parse_qs(kept, keep_blank_values=True):  # its name is encoded
        return before + mark + HIDDEN
    return before + mark + kept + name + (HIDDEN if name else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSettings:
    """Settings of every service.

    Attributes:
        redis_password: Password of the user that the URL names, or of the default user.
        redis_sentinel_password: Password of the Sentinels themselves, if they ask for one.
        redis_tls_ca: Authorities of Valkey's certificate, for a URL with TLS; the system's if None.
        api_keys_file: The callers to let in, see `keys_file`; None lets every caller make every call.
        tls_cert: Server certificate chain; turns TLS on.
        tls_key: The server certificate's private key.
        tls_client_ca: Authorities that must have signed clients' certificates; turns mutual TLS on.
        peer_tls_ca: Authorities of engines' and stores' certificates; turns TLS towards them on.
        peer_tls_cert: Client certificate towards engines, stores and Valkey.
        peer_tls_key: The client certificate's private key.
        peer_api_key: Key towards engines and stores.
        otlp_endpoint: Where spans of requests are sent, ``http://HOST:PORT`` of an OpenTelemetry collector's gRPC port; None
            for nowhere.
        trace_sample_ratio: Part of the traces that begin at this service which is sent, 0 to 1.
    """

    redis_password: Secret | None = secret(help="the password for Valkey")
    redis_sentinel_password: Secret | None = secret(help="the password for the Sentinels of --redis-url")
    redis_tls_ca: Path | None = setting(None, help="trust Valkey's certificate by this, PEM", metavar="FILE")
    api_keys_file: Path | None = setting(
        None, help="who may call: KEY NAME [ROLE] lines; without it everybody may do everything", metavar="FILE"
    )
    tls_cert: Path | None = setting(None, help="server certificate chain, PEM; turns TLS on", metavar="FILE")
    tls_key: Path | None = setting(None, help="its private key, PEM", metavar="FILE")
    tls_client_ca: Path | None = setting(
        None, help="require client certificates of this authority, PEM", metavar="FILE"
    )
    peer_tls_ca: Path | None = setting(
        None, help="trust engines and adapter stores by this, PEM; turns TLS towards them on", metavar="FILE"
    )
    peer_tls_cert: Path | None = setting(
        None, help="client certificate towards engines, adapter stores and Valkey, PEM", metavar="FILE"
    )
    peer_tls_key: Path | None = setting(None, help="its private key, PEM", metavar="FILE")
    peer_api_key: Secret | None = secret(help="the key to send to engines and adapter stores")
    otlp_endpoint: str | None = setting(
        None, help="send traces to this OpenTelemetry collector, http://HOST:PORT (OTLP over gRPC)", metavar="URL"
    )
    trace_sample_ratio: float = setting(1.0, help="part of the traces that begin here which is sent, 0 to 1")

    def check_identity(self, redis_url: str | None) -> None:
        """Check settings that must be given together.

        Raises:
            ValueError: If one of them is missing, or what is given is none.
        """
        if self.otlp_endpoint is not None and not _is_otlp_endpoint(self.otlp_endpoint):
            raise ValueError(f"--otlp-endpoint {self.otlp_endpoint!r}: write http://HOST:PORT or https://HOST:PORT")
        if not 0.0 <= self.trace_sample_ratio <= 1.0:
            raise ValueError(f"--trace-sample-ratio {self.trace_sample_ratio:g} is not in [0, 1]")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together: give both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        if (self.peer_tls_cert is None) != (self.peer_tls_key is None):
            raise ValueError("--peer-tls-cert and --peer-tls-key belong together: give both or neither")
        has_valkey_tls = redis_url is not None and urlsplit(redis_url).scheme in TLS_SCHEMES
        if self.redis_tls_ca is not None and not has_valkey_tls:
            raise ValueError("--redis-tls-ca needs a --redis-url that begins with rediss:// (or rediss-sentinel://)")
        if self.peer_tls_cert is not None and self.peer_tls_ca is None and not has_valkey_tls:
            raise ValueError("--peer-tls-cert needs --peer-tls-ca: without it nothing speaks TLS")

    def listen_config(self, host: str, port: int, **options: Any) -> ServerConfig:
        """Return how the gRPC server listens; ``options`` are further fields of `ServerConfig`."""
        return ServerConfig(
            host=host,
            port=port,
            tls_cert=self.tls_cert,
            tls_key=self.tls_key,
            tls_client_ca=self.tls_client_ca,
            **options,
        )

    def check_store(self, store_target: str | None, store_tls_name: str | None) -> None:
        """Raise `ValueError` if ``--store-target`` cannot be used."""
        has_tls = self.peer_tls_ca is not None
        check_targets("store-target", store_target, tls_name=store_tls_name, has_tls=has_tls)

    def peers(self) -> Peers:
        """Return an object that opens channels to engines and stores.

        Raises:
            OSError: If a file cannot be used.
        """
        is_on = self.peer_tls_ca is not None
        return Peers(
            PeerIdentity(
                tls_ca=self.peer_tls_ca,
                tls_cert=self.peer_tls_cert if is_on else None,
                tls_key=self.peer_tls_key if is_on else None,
                api_key=self.peer_api_key,
            )
        )

    def connect_valkey(self, url: str) -> TranslatingClient:
        """Return a client of Valkey; the caller closes it.

        Raises:
            OSError: If a file cannot be used.
        """
        from loraplex_common.valkey import connect  # a service without Valkey need not have its library

        files = TlsFiles(cert=self.peer_tls_cert, key=self.peer_tls_key, ca=self.redis_tls_ca)
        return connect(url, password=self.redis_password, sentinel_password=self.redis_sentinel_password, tls=files)


async def refuse_cluster(client: TranslatingClient | None) -> None:
    """See `valkey_client.refuse_cluster`; a service without Valkey has nothing to refuse."""
    if client is not None:
        from loraplex_common import valkey_client

        await valkey_client.refuse_cluster(client)


def require_identity(host: str, api_keys_file: Path | None, *, allow_anonymous: bool) -> None:
    """Check that a service with access to all adapters is not open to a network.

    Args:
        host: Address that it listens on.
        api_keys_file: The callers to let in; None lets every caller in.
        allow_anonymous: Whether the operator has declared that this is meant.

    Raises:
        ValueError: If it is open to a network and not declared so.
    """
    if api_keys_file is None and not allow_anonymous and not is_loopback(host):
        raise ValueError(
            f"--host {host} is open to a network: say who may call with --api-keys-file, or, if a mesh or a network "
            f"policy takes care of that, --allow-anonymous"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; of all names, only ``localhost`` counts as such."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _is_otlp_endpoint(url: str) -> bool:
    try:
        return OTLP_ENDPOINT.fullmatch(url) is not None and urlsplit(url).port is not None
    except ValueError:  # brackets that are no address's, a port beyond 65,535
        return False
