"""Peers' figures from ``baselines/*.csv``: of each row the best setting counts."""

from __future__ import annotations

import csv
import functools
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from loraplex_bench.paths import ROOT

if TYPE_CHECKING:
    from loraplex_bench.shapes import AdapterFamily, Shape

BASELINES: Final = ROOT / "benchmarks" / "baselines"
VLLM: Final = "vLLM 0.26.0"
MIXED: Final = ("llama2-7b", "qkvo r64+32+16+8")


class Peer(NamedTuple):
    """The best of the peers on one row."""

    name: str
    value: float | None


NOBODY: Final = Peer("", None)


def end_to_end_file() -> str:
    """Return the name of the peers' whole workloads on this card; an H100's where there is none."""
    return "end_to_end_h200" if torch.cuda.is_available() and "H200" in torch.cuda.get_device_name() else "end_to_end"


@functools.cache
def read_baseline(name: str) -> tuple[dict[str, str], ...]:
    """Return the rows of a baseline file."""
    with (BASELINES / f"{name}.csv").open() as file:
        return tuple(csv.DictReader(file))


def best_end_to_end(
    shape: Shape, family: AdapterFamily, workload: str, num_adapters: int, column: str, *, lowest: bool = False
) -> Peer:
    """Return vLLM's best value of a column over its settings of one workload, e.g. ``burst 512 x 256+128``; of this card."""
    found = [
        (float(row[column]), row["config"].split(";")[0])
        for row in read_baseline(end_to_end_file())
        if row["system"] == VLLM
        and row["workload"] == workload
        and int(row["adapters"]) == num_adapters
        and row[column]
        and _is_of(row["config"], shape.name, family.name, num_adapters)
    ]
    if not found:
        return NOBODY
    value, config = min(found) if lowest else max(found)
    return Peer(f"{VLLM} ({config})", value)


def _is_of(config: str, shape: str, family: str, num_adapters: int) -> bool:
    is_8b, is_mixed = "Llama-3-8B" in config, "ranks 64/32/16/8" in config
    if shape == "llama3-8b":
        return is_8b and family == "all r16"
    if shape != "llama2-7b" or is_8b or "eager" in config:
        return False
    if num_adapters == 0:  # no adapter is asked for, so of which kind they would be does not matter
        return not is_mixed
    return is_mixed if (shape, family) == MIXED else (not is_mixed and family == "qkvo r16")


def best_added(kind: str, where: dict[str, str]) -> tuple[float | None, Peer]:
    """Return (floor, best peer) of the time that LoRA adds, microseconds, from ``layers.csv``.

    Args:
        kind: ``gemm_plus_lora`` or ``decode_stack``.
        where: Column -> value that a row must have.
    """
    rows = [
        row
        for row in read_baseline("layers")
        if row["kind"] == kind and row["extra_us"] and all(row[key] == value for key, value in where.items())
    ]
    if not rows:
        return None, NOBODY
    best = min(rows, key=lambda row: float(row["extra_us"]))
    return float(best["floor_us"]), Peer(best["op"], float(best["extra_us"]))
