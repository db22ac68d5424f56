"""Work on a second stream beside the current one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class Fork:
    """Runs work beside the current stream's; on a CPU, or where it is to, simply in order."""

    def __init__(self, device: torch.device, *, in_order: bool = False) -> None:
        has_side = device.type == "cuda" and not in_order
        self._side = torch.cuda.Stream(device) if has_side else None  # type: ignore[no-untyped-call]

    def beside(self, side_work: Callable[[], None], main_work: Callable[[], None]) -> None:
        """Do both, the first on the side stream; whatever follows on the current stream comes after both."""
        if self._side is None:
            side_work()
            main_work()
            return
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            side_work()
        main_work()
        current.wait_stream(self._side)
