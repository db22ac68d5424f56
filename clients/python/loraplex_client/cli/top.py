"""``loraplex top``: engines, what their pages are used for, adapters by heat, requests; live."""

import json
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer
from loraplex_common.errors import LoraplexError, RoleForbiddenError, UnauthenticatedError
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from loraplex_client._fleet_view import FleetView, watch_fleet
from loraplex_client._servers import Servers
from loraplex_client.cli.context import Target, servers_of, stderr, stdout
from loraplex_client.cli.interrupts import Display

BAR_CELLS: Final = 32
SHOWN_ID: Final = 12
AGAIN_S: Final = 1.0
FRAME_S: Final = 0.25
OWNERS: Final = (("kv", "blue", "K"), ("adapter", "yellow", "A"), ("cached", "cyan", "c"), ("retiring", "magenta", "r"))


def top(
    context: typer.Context,
    target: Target = None,
    once: Annotated[bool, typer.Option("--once", help="Print one reading and end.")] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON: one line for each reading, a second apart; with --once a single one."),
    ] = False,
) -> None:
    """Show engines, pages by owner, adapters by heat and requests, once per second, until Ctrl-C. Takes the role admin."""
    servers = servers_of(context, target)
    if as_json or once:
        _print(servers, once=once, as_json=as_json)
        return
    if not sys.stdout.isatty():
        raise typer.BadParameter("stdout is no terminal: --once prints one reading, --json is for programs")
    display = Display()
    with Live(Text("waiting for the first reading"), console=stdout, screen=True, auto_refresh=False) as live:

        def show(what: RenderableType) -> None:
            display.draw(lambda: live.update(what, refresh=True))

        display.run(lambda: _watch(servers, show))


def _watch(servers: Servers, show: Callable[[RenderableType], None]) -> None:
    """Show the fleet for ever.

    Raises:
        RoleForbiddenError: If the credential's role may not see it.
        UnauthenticatedError: If its credential is unknown.
    """
    while True:
        try:
            shown_at = 0.0
            for view in _fleet(servers):
                if time.monotonic() - shown_at >= FRAME_S:  # engines tell their news one by one
                    show(screen(view, height=stdout.height))
                    shown_at = time.monotonic()
        except (RoleForbiddenError, UnauthenticatedError):
            raise
        except LoraplexError as error:
            show(Text(f"{error.message}; trying again", style="red"))
        time.sleep(AGAIN_S)


def _print(servers: Servers, *, once: bool, as_json: bool) -> None:
    printed_at = 0.0
    for view in _fleet(servers):
        if time.monotonic() - printed_at < AGAIN_S * 0.9:
            continue
        printed_at = time.monotonic()
        if as_json:
            print(json.dumps(view.as_dict()), flush=True)
        else:
            stdout.print(screen(view, height=None))
        if once:
            if not view.engines:
                stderr.print("error: the gateway knows no engine")
                raise typer.Exit(1)
            return


def _fleet(servers: Servers) -> Any:
    """Return the readings of the first gateway that answers.

    Raises:
        LoraplexError: If none does.
    """
    failure: LoraplexError | None = None
    for gateway in servers.gateways:
        try:
            yield from watch_fleet(gateway)
        except (RoleForbiddenError, UnauthenticatedError):
            raise
        except LoraplexError as error:
            failure = error
    if failure is not None:
        raise failure


def screen(view: FleetView, height: int | None) -> RenderableType:
    """Return what is shown; at most as high as the terminal, None for all of it."""
    engines = _engines(view)
    left = None if height is None else max(8, height - engines.row_count - 6)
    adapters, requests = view.adapters(), view.requests()
    num_adapters = len(adapters) if left is None else min(len(adapters), left // 2)
    num_requests = len(requests) if left is None else max(0, left - num_adapters - 4)
    parts: list[RenderableType] = [_summary(view, len(adapters)), engines, Text(), _adapters(adapters[:num_adapters])]
    if num_adapters < len(adapters):
        parts.append(Text(f"and {len(adapters) - num_adapters} more", style="dim"))
    if requests:
        parts += [Text(), _requests(requests[:num_requests])]
    if num_requests < len(requests):
        parts.append(Text(f"and {len(requests) - num_requests} more", style="dim"))
    return Group(*parts)


def _summary(view: FleetView, num_adapters: int) -> Text:
    loads = [engine.load for engine in view.engines.values()]
    running, waiting = sum(load.running for load in loads), sum(load.waiting for load in loads)
    rate = sum(load.tokens_per_s for load in loads)
    text = f"{len(loads)} engines, {running} running, {waiting} waiting, {rate:.1f} tokens/s, {num_adapters} adapters on devices"
    return Text(text, style="bold")


def _engines(view: FleetView) -> Table:
    table = Table("ENGINE", "MODEL", "RUN", "WAIT", "QUEUED", "TOK/S", "PAGES", "KV/LORA/CACHED/FREE", box=None)
    for engine_id, engine in sorted(view.engines.items()):
        if engine.error:
            table.add_row(engine_id[:SHOWN_ID], Text(engine.error, style="red"))
            continue
        pages, load = engine.pool.num_pages_by_owner(), engine.load
        note = " (draining)" if load.draining else " (passed over)" if engine.passed_over else ""
        table.add_row(
            engine_id[:SHOWN_ID] + note,
            engine.info.base_model.name,
            str(load.running),
            str(load.waiting),
            str(load.queued_uncached_tokens),
            f"{load.tokens_per_s:.1f}",
            _bar(pages),
            f"{pages['kv']}/{pages['adapter']}/{pages['cached']}/{pages['free']}",
        )
    return table


def _bar(pages: dict[str, int]) -> Text:
    """Return the shares of the pages' owners; each owner that has pages has a cell."""
    total, bar = sum(pages.values()), Text()
    for owner, colour, letter in OWNERS:
        cells = -(-pages[owner] * BAR_CELLS // total) if total else 0
        bar.append(letter * min(cells, BAR_CELLS - len(bar)), style=colour)
    bar.append("." * (BAR_CELLS - len(bar)), style="dim")
    return bar


def _adapters(adapters: list[dict[str, Any]]) -> Table:
    table = Table("ADAPTER", "REQ/MIN", "PAGES", "IN USE", "ENGINES", box=None)
    for entry in adapters:
        name = Text(entry["name"] + (" (pinned)" if entry["pinned"] else ""))
        rate = f"{entry['requests_per_s'] * 60:.1f}"
        table.add_row(name, rate, str(entry["pages"]), str(entry["leases"]), str(entry["engines"]))
    return table


def _requests(requests: list[dict[str, Any]]) -> Table:
    table = Table("REQUEST", "PHASE", "ADAPTER", "PROMPT", "OUTPUT", "PAGES", "WHOSE", box=None)
    for entry in requests:
        table.add_row(
            Text(entry["request_id"][:SHOWN_ID]),
            entry["phase"],
            Text("+".join(entry["adapters"]) or "(base)"),
            str(entry["prompt_tokens"]),
            str(entry["output_tokens"]),
            str(entry["pages"]),
            Text(entry["whose"]),
        )
    return table
