"""Asks the engine's simulator: a process of its own, JSON in and out, as ``loraplex serve`` starts services."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_client.workload import Trace

MODULE: Final = "loraplex_engine.simulation"
_COLUMNS: Final = ("arrival_s", "adapter", "tenant", "prompt_tokens", "output_tokens", "conversation")


class PlanError(RuntimeError):
    """The simulator refused the question or failed; the message is its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """What the simulator answered; the fields are those of its summary.

    Attributes:
        busy_share: Share of the time in which the mean GPU computed.
        num_preemptions: Requests that were recomputed, over all engines.
        sizes: Pages, and how many adapters fit.
        is_measured: Whether the device's rates were measured on it, or scaled from another's.
        source: Where they come from.
    """

    num_requests: int
    num_done: int
    num_aborted: int
    num_refused: int
    requests_per_s: float
    output_tokens_per_s: float
    attainment: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    resident_share: float
    arena_share: float
    miss_share: float
    busy_share: float
    num_preemptions: int
    sizes: Mapping[str, float]
    is_measured: bool
    source: str


def save_trace(trace: Trace, path: Path) -> None:
    """Write a trace where the simulator reads it."""
    np.savez(path, **{name: getattr(trace, name) for name in _COLUMNS})


def simulate(question: Mapping[str, Any]) -> Simulation:
    """Ask one question; blocks until it is answered.

    Args:
        question: Fields of `loraplex_engine.simulation.question.Question`.

    Raises:
        PlanError: If the simulator refuses or fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", MODULE], input=json.dumps(dict(question)), capture_output=True, text=True, check=False
    )
    try:
        document = json.loads(done.stdout)
    except json.JSONDecodeError:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise PlanError(f"the simulator failed: {last[0]}") from None
    if "error" in document:
        raise PlanError(document["error"]["message"])
    engines = document["engines"]
    summary = document["summary"] | {
        "busy_share": sum(engine["busy_share"] for engine in engines) / len(engines),
        "num_preemptions": sum(engine["num_preemptions"] for engine in engines),
        "sizes": document["sizes"],
        "is_measured": document["device"]["is_measured"],
        "source": document["device"]["source"],
    }
    return Simulation(**{field.name: summary[field.name] for field in fields(Simulation)})
