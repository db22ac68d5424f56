"""Functions that the step loop runs for other threads, between two steps."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from loraplex_engine.messages import Call


T = TypeVar("T")


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


def failing_into(future: Future[T]) -> Future[object]:
    """Return a future of which a failure ends ``future`` too; its success does not.

    For a call that only begins something: what it begins resolves ``future`` later.
    """
    first: Future[object] = Future()

    def pass_on(done: Future[object]) -> None:
        error = done.exception()
        if error is not None and not future.done() and future.set_running_or_notify_cancel():
            future.set_exception(error)

    first.add_done_callback(pass_on)
    return first
