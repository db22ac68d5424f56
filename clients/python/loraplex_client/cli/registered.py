"""Valkey on the command line: where it is, what it asks for, and the engines in its registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from loraplex_common.valkey import TranslatingClient

    from loraplex_client._connection import Connection
    from loraplex_client.valkey_access import ValkeyAccess


def refuse_password_in_view(context: typer.Context, url: str | None) -> None:
    """Refuse a password in a ``--redis-url`` of the command line; the environment may have one.

    Raises:
        BadParameter: If there is one, or the URL is none.
    """
    from loraplex_common.service_settings import whole_url, without_password

    if url is None:
        return
    source = context.get_parameter_source("redis_url")
    is_in_view = source is not None and source.name == "COMMANDLINE"
    try:
        (without_password if is_in_view else whole_url)(url)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--redis-url") from error


def connect_valkey(access: ValkeyAccess, identity: Connection) -> TranslatingClient:
    """Return a client of Valkey; the caller closes it.

    Args:
        access: Which Valkey.
        identity: Whose client certificate is shown, if it has one.

    Raises:
        ConnectionError: If a file cannot be used.
    """
    from loraplex_common.secret import Secret
    from loraplex_common.tls_files import TlsFiles
    from loraplex_common.valkey import connect

    tls = TlsFiles(cert=identity.tls_cert, key=identity.tls_key, ca=access.tls_ca or identity.tls_ca)
    try:
        password = Secret.from_file(access.password_file) if access.password_file else None
        return connect(access.url, password=password, tls=tls)
    except (OSError, ValueError) as error:
        raise ConnectionError(str(error)) from error


async def registered_engines(access: ValkeyAccess, identity: Connection) -> list[str]:
    """Return the targets of all engines whose lease is good.

    Args:
        access: Which Valkey.
        identity: Whose client certificate is shown, if it has one.

    Raises:
        ConnectionError: If Valkey does not answer, or a file cannot be used.
    """
    from loraplex_common.errors import LoraplexError
    from loraplex_common.registry import RegistryReader

    client = connect_valkey(access, identity)
    try:
        return [record.target for record in (await RegistryReader(client).read()).values()]
    except LoraplexError as error:
        raise ConnectionError(str(error)) from error
    finally:
        await client.aclose()
