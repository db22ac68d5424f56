"""Fits a device's rates to steps measured on it.

Weighted linear least squares on relative errors, with what is known of the device beforehand as further equations: a
handful of steps of one model cannot tell, say, the fixed time of a layer from the reading of its weights, so those stay
near what was measured alone (a copy's bandwidth, a large product's rate). Whether products are bound by weights or by
operations depends on the rates, so the fit is repeated until no step changes sides.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
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


def fit(steps: Sequence[MeasuredStep], priors: Mapping[str, Prior], *, noise: float = 0.02) -> StepRates:
    """Return the rates that explain the steps best.

    Args:
        steps: Measured, of one or several models.
        priors: By name of `StepRates`; all of them.
        noise: Relative standard deviation of a measured step.

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
        values = _solve(steps, rates, scale, np.array([priors[name].spread for name in NAMES]), noise)
        if (values < 0).any():
            name = NAMES[int(np.argmin(values))]
            raise CalibrationError(f"{name} comes out negative: the measurements contradict each other")
        if np.allclose(values, before, rtol=1e-9):
            break
    return StepRates(**dict(zip(NAMES, values.tolist(), strict=True)))


def _solve(
    steps: Sequence[MeasuredStep],
    rates: StepRates,
    scale: NDArray[np.float64],
    spread: NDArray[np.float64],
    noise: float,
) -> NDArray[np.float64]:
    """Solve for the rates in units of ``scale``; which side binds a step's products is decided by ``rates``."""
    rows = [features(step.shape, step.load, rates) * scale / (step.seconds * noise) for step in steps]
    known = np.diag(1 / spread)
    matrix = np.vstack([*rows, known])
    target = np.concatenate([np.full(len(steps), 1 / noise), 1 / spread])
    solution = np.linalg.lstsq(matrix, target, rcond=None)[0]
    values: NDArray[np.float64] = solution * scale
    return values


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
