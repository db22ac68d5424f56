"""From the start of a process to its first token, with a cold and a warm cache of compiled kernels."""

from __future__ import annotations

import json
import os
import site
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_client.workload import burst

from loraplex_bench.end_to_end.context import SUITE, free_device
from loraplex_bench.end_to_end.replay import Replay
from loraplex_bench.fp8_checkpoint import forget_files, write_fp8_checkpoint
from loraplex_bench.results import Row
from loraplex_bench.rig import Rig

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from loraplex_common.base_model import BaseModelInfo
    from loraplex_engine.model.weights import WeightSource

    from loraplex_bench.end_to_end.context import Bench
    from loraplex_bench.rig import RigSetup

CHILD_LIMIT_S: Final = 300
VLLM_STARTUP_S: Final = 94.0
"""vLLM 0.26.0 with 200 slots, random weights, from the baselines' notes; with LoRA off 80 s."""


def first_token(setup: RigSetup, weights: WeightSource | None, *, started_at_s: float) -> dict[str, float]:
    """Start an engine, generate two tokens for one request, and return where the time went, in seconds.

    Args:
        setup: Sizes.
        weights: For our backend.
        started_at_s: ``time.time()`` when the process was asked for.
    """
    imported_s = time.time() - started_at_s
    with Rig(setup, weights) as rig:
        measured = Replay(rig, burst(0, 1, prompt_tokens=8, output_tokens=2), workload=0).run()
        measured.require_complete()
        first_s = time.time() - started_at_s - (measured.wall_s - float(measured.first_s[0]))
        return {"imports": imported_s, "engine": rig.ready_s, "capture": rig.capture_s, "first_token": first_s}


def run_startup(
    bench: Bench,
    shape_name: str,
    command: list[str],
    *,
    peer_s: float | None = VLLM_STARTUP_S,
    before: Callable[[], object] | None = None,
) -> None:
    """Start two processes one after the other, the first with an empty kernel cache.

    Args:
        bench: Its memory on the device is given back first.
        shape_name: For the rows.
        command: Starts a process whose last line of output is `first_token`'s result as JSON; ``--started-at`` is added.
        peer_s: The peer's time, of a shape that has one.
        before: Called before each start.
    """
    bench.release()
    with tempfile.TemporaryDirectory() as home:  # the cache lies in the home directory
        for temperature in ("cold", "warm"):
            if before is not None:
                before()
            found = _child(command, home)
            for metric, limit in (("first_token", peer_s), ("capture", None), ("engine", None), ("imports", None)):
                bench.add(
                    Row(
                        suite=SUITE,
                        case=f"{shape_name}/startup/{temperature} kernel cache",
                        metric=metric,
                        value=found[metric],
                        unit="s",
                        peer="vLLM 0.26.0, 200 slots" if limit else "",
                        peer_value=limit,
                    )
                )


def run_startup_of_files(
    bench: Bench, info: BaseModelInfo, command: list[str], argument: str, *, device: torch.device
) -> None:
    """Write an FP8 checkpoint of random weights, then start two processes that read it, each time from the disk.

    Args:
        bench: Its memory on the device is given back first.
        info: The model's shape.
        command: As in `run_startup`.
        argument: Option of the command that names the checkpoint's folder.
        device: Where the weights are drawn.
    """
    bench.release()
    with tempfile.TemporaryDirectory() as parent:
        folder = write_fp8_checkpoint(Path(parent) / info.name, info, device=device)
        free_device()
        bench.results.note(
            f"{info.name}, FP8: {sum(path.stat().st_size for path in folder.iterdir()) / 2**30:.1f} GiB of files, dropped "
            "from the page cache before each start; hashing them is part of the start"
        )
        run_startup(
            bench,
            f"{info.name}, FP8 files",
            [*command, argument, str(folder)],
            peer_s=None,
            before=lambda: forget_files(folder),
        )


def _child(command: list[str], home: str) -> dict[str, float]:
    done = subprocess.run(
        [*command, "--started-at", repr(time.time())],
        env={**os.environ, "HOME": home, "PYTHONUSERBASE": site.getuserbase()},  # packages stay where they are
        stdout=subprocess.PIPE,
        text=True,
        timeout=CHILD_LIMIT_S,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
