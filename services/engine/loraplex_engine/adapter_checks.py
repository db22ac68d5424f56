"""What a runner offers that cannot compute every adapter the layout can hold: it says so before the image travels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from loraplex_common.adapter_image import AdapterSpec


@runtime_checkable
class ChecksAdapters(Protocol):
    """A runner that refuses some adapters."""

    def check_adapter(self, spec: AdapterSpec) -> None:
        """Return if the runner can compute an adapter; from any thread.

        Raises:
            AdapterIncompatibleError: If it cannot; the message names module, rank and remedy.
        """
        ...


def check_adapter(runner: object, spec: AdapterSpec) -> None:
    """Return if a runner can compute an adapter; one that does not check takes all of them.

    Raises:
        AdapterIncompatibleError: If it cannot.
    """
    if isinstance(runner, ChecksAdapters):
        runner.check_adapter(spec)
