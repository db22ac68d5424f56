"""Line charts as SVG text, small enough to write by hand and to read in a diff."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

COLOURS: Final = ("#1f6fb2", "#d1495b", "#2e8b57", "#e08e0b", "#6f4ea1", "#4d4d4d")
WIDTH: Final = 640
HEIGHT: Final = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 40, 48
_STYLE: Final = "text{font:12px sans-serif;fill:#222}.title{font-weight:bold;font-size:14px}.grid{stroke:#ddd}"


@dataclass(frozen=True, slots=True)
class Series:
    """One line.

    Attributes:
        points: (x, y), by rising x.
        is_dashed: For limits and references.
    """

    name: str
    points: Sequence[tuple[float, float]]
    is_dashed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One axis.

    Attributes:
        low: Its beginning; None for what the points need, 0 included.
        is_log: Logarithmic to base 2, ticks at powers of 2; all values must be above 0.
    """

    label: str
    low: float | None = None
    high: float | None = None
    is_log: bool = False

    def span(self, values: Sequence[float]) -> tuple[float, float]:
        """Return the ends of the axis over these values."""
        if self.is_log:
            low = self.low or min(values)
            return low, max(self.high or max(values), low * 1.01)
        low = min(0.0, *values) if self.low is None else self.low
        high = max(values) * 1.05 if self.high is None else self.high
        return low, high if high > low else low + 1.0

    def place(self, value: float, low: float, high: float) -> float:
        """Return a value's place between the ends, 0 to 1."""
        if self.is_log:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    def ticks(self, low: float, high: float) -> list[float]:
        """Return round values between the ends."""
        if self.is_log:
            first, last = math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9)
            return [2.0**power for power in range(first, last + 1)]
        rough = (high - low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_chart(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """Return an SVG document.

    Raises:
        ValueError: If there is no finite point.
    """
    lines = [(one, [(a, b) for a, b in one.points if math.isfinite(a) and math.isfinite(b)]) for one in series]
    points = [point for _, finite in lines for point in finite]
    if not points:
        raise ValueError(f"chart {title!r} has no point")
    x_low, x_high = x.span([a for a, _ in points])
    y_low, y_high = y.span([b for _, b in points])

    def at(a: float, b: float) -> tuple[float, float]:
        across, up = x.place(a, x_low, x_high), y.place(b, y_low, y_high)
        return (
            round(_LEFT + across * (WIDTH - _LEFT - _RIGHT), 1),
            round(HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM), 1),
        )

    parts = [_head(title)]
    for tick in x.ticks(x_low, x_high):
        left, bottom = at(tick, y_low)
        parts.append(_line(left, _TOP, left, bottom) + _text(left, bottom + 16, _number(tick), "middle"))
    for tick in y.ticks(y_low, y_high):
        left, level = at(x_low, tick)
        parts.append(_line(left, level, WIDTH - _RIGHT, level) + _text(left - 6, level + 4, _number(tick), "end"))
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 10, x.label, "middle"))
    parts.append(f'<g transform="translate(14 {HEIGHT / 2}) rotate(-90)">{_text(0, 0, y.label, "middle")}</g>')
    for number, (one, finite) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        parts.append(_path([at(a, b) for a, b in finite], colour, one.is_dashed))
        parts.append(_legend(number, one.name, colour))
    return "\n".join([*parts, "</svg>", ""])


def _head(title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">\n<style>{_STYLE}</style>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>\n'
        f'<text class="title" x="{_LEFT}" y="22">{escape(title)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _path(points: Sequence[tuple[float, float]], colour: str, is_dashed: bool) -> str:
    places = " ".join(f"{left},{level}" for left, level in points)
    dash = ' stroke-dasharray="6 4"' if is_dashed else ""
    marks = "" if is_dashed else "".join(f'<circle cx="{a}" cy="{b}" r="2.5" fill="{colour}"/>' for a, b in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>{marks}'


def _legend(number: int, name: str, colour: str) -> str:
    level = _TOP + 14 + 16 * number
    right = WIDTH - _RIGHT - 8
    return f'<rect x="{right - 10}" y="{level - 9}" width="10" height="10" fill="{colour}"/>' + _text(
        right - 16, level, name, "end"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
