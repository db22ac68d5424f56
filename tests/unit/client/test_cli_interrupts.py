"""A display ends by Ctrl-C whatever its work is doing, and draws nothing afterwards."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest
from loraplex_client.cli.interrupts import Display
from loraplex_common.errors import RoleForbiddenError

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT_S = 30


@pytest.fixture(autouse=True)
def as_at_a_terminal() -> Iterator[None]:
    """A job in the background of a shell ignores Ctrl-C, and so do the tests that it runs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_a_display_whose_work_goes_on_and_nothing_is_drawn_afterwards() -> None:
    display, drawn, goes_on = Display(), [], threading.Event()
    has_tried = threading.Event()

    def work() -> None:
        display.draw(lambda: drawn.append("before"))
        os.kill(os.getpid(), signal.SIGINT)
        assert goes_on.wait(TIMEOUT_S)
        display.draw(lambda: drawn.append("afterwards"))
        has_tried.set()

    with pytest.raises(KeyboardInterrupt):
        display.run(work)
    goes_on.set()

    assert has_tried.wait(TIMEOUT_S)
    assert drawn == ["before"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_the_work_raises_ends_the_display() -> None:
    def work() -> None:
        raise RoleForbiddenError("no")

    with pytest.raises(RoleForbiddenError):
        Display().run(work)
