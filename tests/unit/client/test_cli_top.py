"""``loraplex top``: texts of others are shown as they are, nothing is cropped, nothing waits for an engine that has left."""

from __future__ import annotations

import io
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.v1 import engine_pb2, fleet_pb2
from loraplex_client._fleet_view import FleetView
from loraplex_client._stream_thread import news_or_silence
from loraplex_client.cli.fitting import share_lines
from loraplex_client.cli.top import screen
from loraplex_common.error_status import to_status
from loraplex_common.errors import DrainingError
from rich.cells import cell_len
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.cli_runner import Runner
    from support.fleet_double import FleetDouble

ODD_NAME = "org/[bold]base[/bold] :smile: [/x]"


def news_of(engine_id: str, *, num_adapters: int = 1, num_requests: int = 0) -> fleet_pb2.WatchFleetResponse:
    news = fleet_pb2.WatchFleetResponse(engine_id=engine_id, target="engine:8520")
    news.info.base_model.name = ODD_NAME
    change = news.change
    change.snapshot, change.num_pages = True, 100
    for holder in range(num_adapters):
        digest = f"{holder:064x}"
        change.adapters.add(holder=holder, adapter=engine_pb2.ResidentAdapter(digest=digest, num_pages=3))
        news.adapter_names[digest] = f"adapter-{holder}"
    for holder in range(num_requests):
        change.requests.add(holder=holder, request_id=f"r{holder}", fairness_key="[red]tenant\n\x1b[2J")
    return news


def failure_of(engine_id: str) -> fleet_pb2.WatchFleetResponse:
    news = fleet_pb2.WatchFleetResponse(engine_id=engine_id, target="engine:8520")
    news.error.CopyFrom(to_status(DrainingError("[b]the engine[/b] has ended its stream")))
    return news


def printed(view: FleetView, height: int | None, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False)
    console.print(screen(view, height=height, width=width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def full_view() -> FleetView:
    view = FleetView()
    for number in range(3):
        view.apply(news_of(f"engine-{number}", num_adapters=20, num_requests=7))
    view.apply(failure_of("engine-3"))
    return view


@given(height=st.integers(3, 60), width=st.integers(20, 200))
def test_whatever_the_size_of_the_terminal_no_line_is_cropped(height: int, width: int) -> None:
    lines = printed(full_view(), height, width)

    assert len(lines) <= height
    assert max(map(cell_len, lines)) <= width


def test_what_does_not_fit_is_counted() -> None:
    lines = [line.strip() for line in printed(full_view(), 24, 80)]

    assert any("engine-0" in line for line in lines)
    assert any("adapter-0" in line for line in lines)
    counted = [line for line in lines if line.startswith("and ")]
    shown_adapters = sum("adapter-" in line for line in lines)
    assert f"and {20 - shown_adapters} more adapters" in counted
    assert sum(line.startswith("r") and "(base)" in line for line in lines) == 21 - int(counted[-1].split()[1])


def test_an_engine_that_failed_is_shown_before_those_that_run() -> None:
    lines = printed(full_view(), 13, 120)

    assert any("[b]the engine[/b] has ended its stream" in line for line in lines)


def test_brackets_and_colons_of_others_are_letters(loraplex: Runner, fleet: FleetDouble) -> None:
    fleet.engines.append(fleet_pb2.EngineState(engine_id="engine-1", target="engine:8520"))
    fleet.news.append(news_of("engine-1", num_requests=1))

    result = loraplex("top", "--once")

    assert result.code == 0, result.err
    assert ODD_NAME in result.out
    assert "[red]tenant??[2J" in result.out


def test_an_engine_that_left_before_it_was_watched_is_not_waited_for(loraplex: Runner, fleet: FleetDouble) -> None:
    leaving = fleet_pb2.EngineState(engine_id="engine-1", target="engine:8520")
    fleet.leaving.append(leaving)
    fleet.engines.append(fleet_pb2.EngineState(engine_id="engine-2", target="engine:8521"))
    fleet.news.append(news_of("engine-2"))

    result = loraplex("top", "--once", "--json")

    assert result.code == 0, result.err
    assert '"engine-2"' in result.out
    assert '"engine-1"' not in result.out


def test_once_says_so_if_the_only_engine_has_left(loraplex: Runner, fleet: FleetDouble) -> None:
    fleet.leaving.append(fleet_pb2.EngineState(engine_id="engine-1", target="engine:8520"))

    result = loraplex("top", "--once")

    assert result.code == 1
    assert "knows no engine" in result.err


@given(wanted=st.lists(st.integers(0, 50), min_size=1, max_size=5), room=st.integers(0, 120))
def test_sections_share_all_lines_that_they_want(wanted: list[int], room: int) -> None:
    shares = share_lines(wanted, room)

    assert sum(shares) == min(room, sum(wanted))
    assert all(0 <= share <= want for share, want in zip(shares, wanted, strict=True))


def test_silence_is_told_and_a_failure_of_the_stream_is_raised() -> None:
    may_go_on = threading.Event()

    def stream() -> Iterator[int]:
        yield 1
        may_go_on.wait(60)
        raise DrainingError("over")

    read = news_or_silence(stream(), 0.05)

    assert next(read) == 1
    assert next(read) is None
    may_go_on.set()
    with pytest.raises(DrainingError, match="over"):
        all(message is None for message in read)
