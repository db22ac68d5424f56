"""``python -m loraplex_engine.compute_devices``: what this machine computes with, as engines that are started here see it.

``loraplex serve`` asks this before it divides the machine among several engines: it needs torch to know, and has none itself.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

VISIBLE: Final = "CUDA_VISIBLE_DEVICES"


def gpu_names(count: int, environ: Mapping[str, str]) -> list[str]:
    """Return what `VISIBLE` calls each GPU that torch sees; CUDA hides all behind the first that is not there.

    Args:
        count: GPUs that torch sees.
        environ: Environment that they are seen in.
    """
    listed = [name.strip() for name in environ.get(VISIBLE, "").split(",") if name.strip()]
    return listed[:count] if listed else [str(number) for number in range(count)]


def main() -> None:
    """Print the GPUs and the compute threads as JSON, on one line."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    print(json.dumps({"gpus": gpu_names(count, os.environ), "num_threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
