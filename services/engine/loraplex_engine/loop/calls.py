"""Functions that other threads have the step loop's thread run."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraplex_engine.messages import Call


def run_call(call: Call) -> None:
    """Run a function for another thread; its exception goes to the calling thread's future."""
    if not call.future.set_running_or_notify_cancel():
        return
    try:
        result = call.function()
    except Exception as error:
        call.future.set_exception(error)
    else:
        call.future.set_result(result)


def failing_into(future: Future[int]) -> Future[object]:
    """Return a future that passes its failure on to ``future``, but not its success."""
    first: Future[object] = Future()

    def pass_on(done: Future[object]) -> None:
        error = done.exception()
        if error is not None and not future.done():
            future.set_exception(error)

    first.add_done_callback(pass_on)
    return first
