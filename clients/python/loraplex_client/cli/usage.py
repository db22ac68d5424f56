"""``loraplex usage``: what tenants and adapters used, summed over the gateways' records in Valkey."""

import asyncio
import json
import re
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer
from loraplex_common.errors import LoraplexError
from loraplex_common.usage_records import USAGE_KEY, UsageSum, UsageSums, read_usage
from rich.table import Table

from loraplex_client._connection import Connection
from loraplex_client.cli.context import servers_of, stderr, stdout
from loraplex_client.cli.option_groups import grouped
from loraplex_client.cli.registered import connect_valkey, refuse_password_in_view
from loraplex_client.valkey_access import ValkeyAccess

_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Group(StrEnum):
    """What records are summed by."""

    tenant = "tenant"
    adapter = "adapter"
    revision = "revision"
    model = "model"


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageOptions:
    """Which records, from where, and how they are shown."""

    redis_url: Annotated[str, typer.Option(envvar="LORAPLEX_REDIS_URL", help="The gateways' Valkey.")]
    redis_password_file: Annotated[
        Path | None,
        typer.Option(
            envvar="LORAPLEX_REDIS_PASSWORD_FILE", help="Its password for the user in the URL.", metavar="FILE"
        ),
    ] = None
    redis_tls_ca: Annotated[
        Path | None,
        typer.Option(envvar="LORAPLEX_REDIS_TLS_CA", help="Trust its certificate by this, PEM.", metavar="FILE"),
    ] = None
    since: Annotated[
        str, typer.Option(help="Requests that ended in so long a time until now: 90s, 30m, 24h or 7d.", metavar="TIME")
    ] = "24h"
    by: Annotated[
        list[Group] | None,
        typer.Option(help="Sum by this; may be given again (default: by tenant and adapter)."),
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False


class Unreadable:
    """Entries that are no records, which sums leave out.

    Attributes:
        num_entries: How many there are.
    """

    def __init__(self) -> None:
        self.num_entries = 0
        self._newest = ""

    def add(self, entry: str, error: ValueError) -> None:
        """Note an entry, and why it is no record."""
        self.num_entries += 1
        self._newest = self._newest or f"{entry}: {error}"

    def told(self) -> str:
        """Return what to say of them."""
        entry = self._newest.partition(":")[0]
        return (
            f"error: the sums are without {self.num_entries} of the entries of {USAGE_KEY}, as no usage records; the newest, "
            f"{self._newest}. Take it out: XDEL {USAGE_KEY} {entry}"
        )


@grouped
def usage(context: typer.Context, *, asked: UsageOptions) -> None:
    """Sum tokens and page-seconds of ended requests by tenant and adapter."""
    refuse_password_in_view(context, asked.redis_url)
    since = time.time() - _seconds(asked.since)
    access = ValkeyAccess(url=asked.redis_url, password_file=asked.redis_password_file, tls_ca=asked.redis_tls_ca)
    by = tuple(dict.fromkeys(group.value for group in asked.by or (Group.tenant, Group.adapter)))
    found, unreadable = UsageSums(by), Unreadable()
    try:
        asyncio.run(_read(access, servers_of(context, None, None).engine(""), since, found, unreadable))
    except ConnectionError as error:
        stderr.print(f"error: valkey: {error}", soft_wrap=True)
        raise typer.Exit(1) from error
    sums = sorted(found.sums.items(), key=lambda entry: -entry[1].kv_page_s - entry[1].adapter_page_s)
    if asked.as_json:
        for values, used in sums:
            print(json.dumps(dict(zip(by, values, strict=True)) | asdict(used), ensure_ascii=False))
    else:
        stdout.print(_table(by, sums))
    if unreadable.num_entries:
        stderr.print(unreadable.told(), soft_wrap=True, markup=False)
        raise typer.Exit(1)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhd])", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a time such as 90s, 30m, 24h or 7d", param_hint="--since")
    return float(match[1]) * _UNITS_S[match[2]]


async def _read(
    access: ValkeyAccess, identity: Connection, since: float, found: UsageSums, unreadable: Unreadable
) -> None:
    client = connect_valkey(access, identity)
    try:
        async for record in read_usage(client, since=max(0.0, since), on_unreadable=unreadable.add):
            found.add(record)
    except (LoraplexError, ValueError) as error:
        raise ConnectionError(str(error)) from error
    finally:
        await client.aclose()


def _table(by: tuple[str, ...], sums: list[tuple[tuple[str, ...], UsageSum]]) -> Table:
    table = Table(*(name.upper() for name in by), box=None)
    for name in ("REQUESTS", "FAILED", "INPUT", "CACHED", "OUTPUT", "KV PAGE-S", "ADAPTER PAGE-S", "QUEUE S"):
        table.add_column(name, justify="right")
    for values, used in sums:
        counts = (used.requests, used.failed, used.input_tokens, used.cached_tokens, used.output_tokens)
        seconds = (used.kv_page_s, used.adapter_page_s, used.queue_s)
        shown = [value or "-" for value in values]
        table.add_row(*shown, *(str(count) for count in counts), *(f"{value:.1f}" for value in seconds))
    return table
