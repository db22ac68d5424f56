"""Several addresses of one service: ``a:8510,b:8510``, any of which answers for all."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

RESOLVE_S: Final = 5.0
"""Seconds for which the addresses of names are believed."""


def parse_targets(text: str) -> tuple[str, ...]:
    """Return the addresses in a list; a single one may be any gRPC name, such as ``dns:///stores:8510``.

    Raises:
        ValueError: If an address is empty, comes twice, or is one of several and no ``HOST:PORT``.
    """
    targets = tuple(part.strip() for part in text.split(","))
    if len(targets) == 1 and targets[0]:
        return targets
    for target in targets:
        _split(target)
    if len(set(targets)) < len(targets):
        raise ValueError(f"{text!r}: an address comes twice")
    return targets


def check_targets(flag: str, text: str | None, *, tls_name: str | None, has_tls: bool) -> None:
    """Refuse a list of addresses that cannot be used.

    Args:
        flag: The flag that has it, for the message.
        text: The list; None is no service.
        tls_name: The name that the services' certificates have in common.
        has_tls: Whether connections are encrypted.

    Raises:
        ValueError: If the list is malformed, or has several addresses and no name to check their certificates by.
    """
    if text is None:
        return
    try:
        targets = parse_targets(text)
    except ValueError as error:
        raise ValueError(f"--{flag} {error}") from None
    if len(targets) > 1 and has_tls and tls_name is None:
        name_flag = flag.replace("-target", "-tls-name")
        raise ValueError(f"--{flag} has several addresses: --{name_flag} must give the name in the certificates of all")


def in_turn(text: str) -> Iterator[str]:
    """Yield one address after the other for ever, beginning with any, so that not all peers begin with the same."""
    targets = parse_targets(text)
    first = random.randrange(len(targets))
    return itertools.cycle((*targets[first:], *targets[:first]))


async def channel_target(text: str) -> str:
    """Return a gRPC name of all addresses in a list; of several, names that do not resolve now are left out.

    Raises:
        OSError: If none of several names resolves.
    """
    targets = parse_targets(text)
    if len(targets) == 1:
        return targets[0]
    loop = asyncio.get_running_loop()
    looked_up = [loop.getaddrinfo(*_split(target), type=socket.SOCK_STREAM) for target in targets]
    answers = await asyncio.gather(*looked_up, return_exceptions=True)
    if failed := [
        answer for answer in answers if isinstance(answer, BaseException) and not isinstance(answer, OSError)
    ]:
        raise failed[0]
    found = [entry for answer in answers if not isinstance(answer, BaseException) for entry in answer]
    # One channel takes addresses of one family.
    for family, scheme, form in ((socket.AF_INET, "ipv4", "{}:{}"), (socket.AF_INET6, "ipv6", "[{}]:{}")):
        addresses = dict.fromkeys(form.format(*entry[4][:2]) for entry in found if entry[0] == family)
        if addresses:
            return f"{scheme}:{','.join(sorted(addresses))}"
    raise OSError(f"none of {text} resolves")


def _split(target: str) -> tuple[str, int]:
    host, mark, port = target.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not mark or not host or "/" in host or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise ValueError(f"{target!r} is no HOST:PORT; several addresses are separated by commas")
    return host, int(port)
