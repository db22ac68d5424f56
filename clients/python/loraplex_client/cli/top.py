"""``loraplex top``: engines, what their pages are used for, adapters by heat, requests; live."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final

import typer
from loraplex_common.errors import LoraplexError, RoleForbiddenError, UnauthenticatedError
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from loraplex_client._fleet_view import FleetView, WatchedEngine, watch_fleet
from loraplex_client._servers import Servers
from loraplex_client.cli.context import Target, servers_of, stderr, stdout
from loraplex_client.cli.fitting import Column, fitted_table, share_lines
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
                    show(screen(view, height=stdout.height, width=stdout.width))
                    shown_at = time.monotonic()
        except (RoleForbiddenError, UnauthenticatedError):
            raise
        except LoraplexError as error:
            show(_line(Text(f"{error.message}; trying again", style="red"), stdout.width))
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


@dataclass(frozen=True, slots=True)
class Section:
    """A table of the screen.

    Attributes:
        what: What its rows are, in plural.
        columns: Its columns, all of one length.
        failures: Lines below its rows, each instead of a row.
    """

    what: str
    columns: Sequence[Column]
    failures: Sequence[Text] = ()

    @property
    def wanted_lines(self) -> int:
        """Lines that all of it takes: headers, rows, failures."""
        return 1 + len(self.columns[0].cells) + len(self.failures)

    def shown(self, num_lines: int, width: int | None) -> Iterator[RenderableType]:
        """Yield what fits into so many lines; the last one says how many rows do not."""
        num_rows = len(self.columns[0].cells)
        hidden = 0 if num_lines >= self.wanted_lines else self.wanted_lines - 1 - max(0, num_lines - 2)
        kept_rows = max(0, num_rows - hidden)  # failures are the last to go
        kept_failures = len(self.failures) - (hidden - (num_rows - kept_rows))
        if num_lines > 1:
            yield fitted_table([replace(column, cells=column.cells[:kept_rows]) for column in self.columns], width)
        for failure in self.failures[:kept_failures]:
            yield _line(Text.styled(failure.plain, "red"), width)
        if hidden and num_lines > 0:
            yield _line(Text(f"and {hidden} more {self.what}", style="dim"), width)


def screen(view: FleetView, height: int | None, width: int | None = None) -> RenderableType:
    """Return what is shown: at most ``height`` lines of ``width`` cells of a terminal, None for all of it."""
    adapters, requests = view.adapters(), view.requests()
    sections = [_engines(view), _adapters(adapters), *([_requests(requests)] if requests else [])]
    wanted = [section.wanted_lines for section in sections]
    given = wanted if height is None else share_lines(wanted, height - len(sections))  # summary, lines between sections
    parts: list[RenderableType] = [_line(_summary(view, len(adapters)), width)]
    for section, num_lines in zip(sections, given, strict=True):
        if len(parts) > 1 and num_lines:
            parts.append(Text())
        parts += section.shown(num_lines, width)
    return Group(*parts)


def _line(text: Text, width: int | None) -> Text:
    """Return a text as one line that ends with an ellipsis if it is too long."""
    line = text.copy()
    line.no_wrap, line.overflow = True, "ellipsis"
    if width is not None:
        line.truncate(width, overflow="ellipsis")
    return line


def _summary(view: FleetView, num_adapters: int) -> Text:
    loads = [engine.load for engine in view.engines.values()]
    running, waiting = sum(load.running for load in loads), sum(load.waiting for load in loads)
    rate = sum(load.tokens_per_s for load in loads)
    text = f"{len(loads)} engines, {running} running, {waiting} waiting, {rate:.1f} tokens/s, {num_adapters} adapters on devices"
    return Text(text, style="bold")


def _engines(view: FleetView) -> Section:
    engines = sorted(view.engines.items())
    failures = [_plain(f" {each[:SHOWN_ID]}  {engine.error}") for each, engine in engines if engine.error]
    shown = [(engine_id, engine) for engine_id, engine in engines if not engine.error]
    loads = [engine.load for _, engine in shown]
    pages = [engine.pool.num_pages_by_owner() for _, engine in shown]
    counts = [f"{each['kv']}/{each['adapter']}/{each['cached']}/{each['free']}" for each in pages]
    columns = [
        Column("ENGINE", [_plain(engine_id[:SHOWN_ID] + _note(engine)) for engine_id, engine in shown], least=SHOWN_ID),
        Column("MODEL", [_plain(engine.info.base_model.name) for _, engine in shown], rank=1, least=12),
        Column("RUN", _numbers(load.running for load in loads)),
        Column("WAIT", _numbers(load.waiting for load in loads)),
        Column("QUEUED", _numbers(load.queued_uncached_tokens for load in loads), rank=3),
        Column("TOK/S", [Text(f"{load.tokens_per_s:.1f}") for load in loads]),
        Column("PAGES", [_bar(each) for each in pages], rank=4),
        Column("KV/LORA/CACHED/FREE", [Text(each) for each in counts], rank=2),
    ]
    return Section("engines", columns, failures)


def _note(engine: WatchedEngine) -> str:
    return " (draining)" if engine.load.draining else " (passed over)" if engine.passed_over else ""


def _bar(pages: dict[str, int]) -> Text:
    """Return the shares of the pages' owners; each owner that has pages has a cell."""
    total, bar = sum(pages.values()), Text()
    for owner, colour, letter in OWNERS:
        cells = -(-pages[owner] * BAR_CELLS // total) if total else 0
        bar.append(letter * min(cells, BAR_CELLS - len(bar)), style=colour)
    bar.append("." * (BAR_CELLS - len(bar)), style="dim")
    return bar


def _adapters(adapters: list[dict[str, Any]]) -> Section:
    names = [_plain(each["name"] + (" (pinned)" if each["pinned"] else "")) for each in adapters]
    rates = [Text(f"{each['requests_per_s'] * 60:.1f}") for each in adapters]
    columns = [
        Column("ADAPTER", names, least=16),
        Column("REQ/MIN", rates),
        Column("PAGES", _numbers(each["pages"] for each in adapters), rank=1),
        Column("IN USE", _numbers(each["leases"] for each in adapters)),
        Column("ENGINES", _numbers(each["engines"] for each in adapters), rank=2),
    ]
    return Section("adapters", columns)


def _requests(requests: list[dict[str, Any]]) -> Section:
    adapters = [_plain("+".join(each["adapters"]) or "(base)") for each in requests]
    columns = [
        Column("REQUEST", [_plain(each["request_id"][:SHOWN_ID]) for each in requests]),
        Column("PHASE", [Text(each["phase"]) for each in requests], rank=1),
        Column("ADAPTER", adapters, least=16),
        Column("PROMPT", _numbers(each["prompt_tokens"] for each in requests), rank=2),
        Column("OUTPUT", _numbers(each["output_tokens"] for each in requests)),
        Column("PAGES", _numbers(each["pages"] for each in requests), rank=3),
        Column("WHOSE", [_plain(each["whose"]) for each in requests], rank=4, least=8),
    ]
    return Section("requests", columns)


def _numbers(numbers: Iterable[int]) -> list[Text]:
    return [Text(str(number)) for number in numbers]


def _plain(text: str) -> Text:
    """Return a text of others as one line: they may have written line breaks and a terminal's commands in it."""
    return Text("".join(letter if letter.isprintable() else "?" for letter in text))
