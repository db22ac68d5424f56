"""Reads single steps that ``benchmarks/engine.py --steps`` measured, as loads of the step-cost model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from loraplex_engine.simulation.calibration import CalibrationError, MeasuredStep
from loraplex_engine.simulation.shapes import ALL_TARGETS, ATTENTION_TARGETS, ModelShape, base_model
from loraplex_engine.simulation.step_cost import StepLoad

if TYPE_CHECKING:
    from collections.abc import Iterable

# e.g. llama2-7b/qkvo r16/decode:64x320:64: 64 rows after 320 tokens over 64 adapters
_CASE: Final = re.compile(
    r"(?P<shape>[^/]+)/(?P<targets>qkvo|all) r(?P<ranks>\d+([/+]\d+)*)/"
    r"(?P<kind>decode|prefill):(?P<rows>\d+)x(?P<tokens>\d+):(?P<adapters>\d+)"
)
TARGETS: Final = {"qkvo": ATTENTION_TARGETS, "all": ALL_TARGETS}


def measured_steps(rows: Iterable[dict[str, Any]]) -> list[MeasuredStep]:
    """Return the steps among a result file's rows.

    Raises:
        CalibrationError: If a step's case cannot be read.
    """
    return [
        measured_step(row["case"], row["value"] / 1e3)
        for row in rows
        if row["suite"] == "steps" and row["metric"] == "step"
    ]


def measured_step(case: str, seconds: float) -> MeasuredStep:
    """Return the load that a case's name says.

    Raises:
        CalibrationError: If it says none.
    """
    match = _CASE.fullmatch(case)
    if match is None:
        raise CalibrationError(f"{case!r} is not SHAPE/TARGETS rRANKS/decode|prefill:ROWSxTOKENS:ADAPTERS")
    shape = ModelShape(base_model(match["shape"]))
    ranks = [int(rank) for rank in re.split("[/+]", match["ranks"])]
    rows, tokens, num_adapters = int(match["rows"]), int(match["tokens"]), int(match["adapters"])
    sizes = [shape.adapter(ranks[index % len(ranks)], TARGETS[match["targets"]]) for index in range(num_adapters)]
    is_decode = match["kind"] == "decode"
    num_tokens = rows if is_decode else rows * tokens
    load = StepLoad(
        num_tokens=num_tokens,
        num_sampled=rows,
        kv_tokens=rows * (tokens + 1) if is_decode else 0,
        attention_pairs=0 if is_decode else rows * tokens * (tokens + 1) // 2,
        adapter_bytes=sum(size.weight_bytes for size in sizes),
        lora_bytes=num_tokens * sizes[0].traffic_bytes if sizes else 0,
        lora_ops=sizes[0].num_ops if sizes else 0,
        num_decode_rows=rows if is_decode else 0,
    )
    return MeasuredStep(shape, load, seconds)
