"""Fits a device's rates to steps measured on it.

Weighted linear least squares on relative errors, with what is known of the device beforehand as further equations: a
handful of steps of one model cannot tell, say, the fixed time of a layer from the reading of its weights, so those stay
near what was measured alone (a copy's bandwidth, a large product's rate). Whether products are bound by weights or by
operations depends on the rates, so the fit is repeated until no step changes sides.

What LoRA takes is read off differences: a step with adapters against the same step without. What the model gets wrong of
the base cancels there; in 194 ms with 16 of LoRA it would hide it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from loraplex_engine.simulation.shapes import ModelShape
from loraplex_engine.simulation.step_cost import StepCost, StepLoad, StepRates

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

MAX_ROUNDS = 20
NAMES = tuple(field.name for field in fields(StepRates))


class CalibrationError(ValueError):
    """The measurements do not determine the rates; the message says why."""


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One step that was timed.

    Attributes:
        seconds: Its duration.
    """

    shape: ModelShape
    load: StepLoad
    seconds: float


@dataclass(frozen=True, slots=True)
class Prior:
    """What is known of a rate before the fit.

    Attributes:
        value: Seconds per unit.
        spread: Relative standard deviation: 0.05 for what was measured alone, 1 for a guess.
    """

    value: float
    spread: float


def fit(
    steps: Sequence[MeasuredStep],
    priors: Mapping[str, Prior],
    *,
    noise: float = 0.02,
    difference_noise: float = 0.005,
) -> StepRates:
    """Return the rates that explain the steps best.

    Args:
        steps: Measured, of one or several models.
        priors: By name of `StepRates`; all of them.
        noise: Relative standard deviation of a measured step from what the model can say.
        difference_noise: The same of a difference of two steps, relative to the longer one.

    Raises:
        CalibrationError: If a prior is missing, a step took no time or a rate comes out negative.
    """
    if missing := set(NAMES) - set(priors):
        raise CalibrationError(f"no prior for {', '.join(sorted(missing))}")
    if any(step.seconds <= 0 for step in steps):
        raise CalibrationError("a measured step took no time")
    scale = np.array([priors[name].value for name in NAMES])
    values = scale.copy()
    for _ in range(MAX_ROUNDS):
        rates = StepRates(**dict(zip(NAMES, values.tolist(), strict=True)))
        before = values
        matrix, target = _equations(steps, rates, scale, noise, difference_noise)
        known = np.array([1 / priors[name].spread for name in NAMES])
        values = np.linalg.lstsq(np.vstack([matrix, np.diag(known)]), np.append(target, known), rcond=None)[0] * scale
        if (values < 0).any():
            name = NAMES[int(np.argmin(values))]
            raise CalibrationError(f"{name} comes out negative: the measurements contradict each other")
        if np.allclose(values, before, rtol=1e-9):
            break
    return StepRates(**dict(zip(NAMES, values.tolist(), strict=True)))


def _equations(
    steps: Sequence[MeasuredStep],
    rates: StepRates,
    scale: NDArray[np.float64],
    noise: float,
    difference_noise: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the equations of the rates in units of ``scale``; which side binds a step's products is decided by ``rates``."""
    without = {(step.shape.info.name, step.load): step for step in steps if not step.load.has_lora}
    rows, target = [], []
    for step in steps:
        units, seconds, deviation_s = features(step.shape, step.load, rates), step.seconds, step.seconds * noise
        base = without.get((step.shape.info.name, _without_lora(step.load)))
        if base is not None and base is not step:
            units = units - features(base.shape, base.load, rates)
            seconds, deviation_s = step.seconds - base.seconds, step.seconds * difference_noise
        rows.append(units * scale / deviation_s)
        target.append(seconds / deviation_s)
    return np.array(rows).reshape(-1, len(NAMES)), np.array(target)


def _without_lora(load: StepLoad) -> StepLoad:
    return replace(
        load,
        adapter_bytes=0,
        adapter_beside_bytes=0,
        lora_bytes=0,
        lora_row_bytes=0,
        lora_ops=0,
        lora_prompt_ops=0,
        lora_runs=0,
    )


def features(shape: ModelShape, load: StepLoad, rates: StepRates) -> NDArray[np.float64]:
    """Return the units of each rate in a step, so that their scalar product with the rates is its duration.

    Read off `StepCost` itself, one rate at a time; the side that does not bind the products counts nothing.
    """
    weights_s = shape.weight_bytes * rates.weight_byte_s
    flops = 2 * (load.num_tokens * shape.layer_weights + load.num_sampled * shape.head_weights)
    off = "flop_s" if weights_s >= flops * rates.flop_s else "weight_byte_s"
    units = []
    for name in NAMES:
        only = dict.fromkeys(NAMES, 0.0) | {name: 1.0}
        units.append(0.0 if name == off else StepCost(shape, StepRates(**only)).seconds(load))
    return np.array(units)


def errors(steps: Sequence[MeasuredStep], rates: StepRates) -> NDArray[np.float64]:
    """Return each step's predicted over measured duration, minus one."""
    predicted = np.array([StepCost(step.shape, rates).seconds(step.load) for step in steps])
    relative: NDArray[np.float64] = predicted / np.array([step.seconds for step in steps]) - 1
    return relative


def to_dict(rates: StepRates) -> dict[str, float]:
    """Return the rates by name."""
    return asdict(rates)
