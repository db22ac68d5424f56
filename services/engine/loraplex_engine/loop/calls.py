"""Functions that other threads have run by the step loop's."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraplex_engine.messages import Call


def run_call(call: Call) -> None:
    """Run a function for another thread; what it raises is the caller's affair."""
    if not call.future.set_running_or_notify_cancel():
        return
    try:
        result = call.function()
    except Exception as error:
        call.future.set_exception(error)
    else:
        call.future.set_result(result)


def failing_into(future: Future[int]) -> Future[object]:
    """Return a future whose failure is passed on to ``future``; its success is not."""
    first: Future[object] = Future()

    def pass_on(done: Future[object]) -> None:
        error = done.exception()
        if error is not None and not future.done():
            future.set_exception(error)

    first.add_done_callback(pass_on)
    return first
