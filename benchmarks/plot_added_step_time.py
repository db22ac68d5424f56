"""Draws what LoRA adds to a Llama-2-7B decode step against the batch size: ours, the floor, the peers. Writes an SVG.

    python benchmarks/plot_added_step_time.py benchmarks/results/layers-*.json --popularity distinct \
        --out docs/img/added-step-time.svg

Ours are the ``added`` rows of `benchmarks/layers.py` (the last file named that has them), the rest is baselines/layers.csv.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraplex_bench.peers import read_baseline

MODEL: Final = "llama2-7b"
PEERS: Final = {
    "sgl_v2": "SGLang triton_v2",
    "sgl_csgmv": "SGLang csgmv",
    "vllm_tuned": "vLLM, hand-picked blocks",
    "vllm": "vLLM",
}
COLOURS: Final = ("#0b6e4f", "#444444", "#c1440e", "#d98e04", "#7a5195", "#4a7fb5")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 440, 70, 190, 46, 52
TICKS_MS: Final = (0.01, 0.1, 1.0, 10.0, 100.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve.

    Attributes:
        points: (batch, milliseconds), by rising batch.
        is_dashed: The floor is.
    """

    name: str
    points: tuple[tuple[int, float], ...]
    is_dashed: bool = False


def our_line(paths: list[Path], popularity: str) -> Line | None:
    """Return our curve from the last of the files that has it."""
    for path in reversed(paths):
        points = {}
        for row in json.loads(path.read_text())["rows"]:
            parts = row["case"].split("/")
            if row["metric"] == "added" and parts[:2] == ["decode_stack", MODEL] and popularity in _kinds(parts):
                points[int(parts[2])] = row["value"] / 1e3
        if points:
            return Line(name="loraplex", points=tuple(sorted(points.items())))
    return None


def _kinds(parts: list[str]) -> tuple[str, ...]:
    """Return the popularities a case stands for: one row is its own adapter, whichever way it is drawn."""
    return ("distinct", "zipf") if parts[2] == "1" else (parts[4],)


def baseline_lines(popularity: str) -> list[Line]:
    """Return the floor and the peers."""
    added: dict[str, dict[int, float]] = {name: {} for name in ("floor", *PEERS)}
    for row in read_baseline("layers"):
        is_of = row["popularity"] == popularity or row["M"] == "1"
        if row["kind"] == "decode_stack" and row["extra_us"] and is_of:
            added["floor"][int(row["M"])] = float(row["floor_us"]) / 1e3
            if row["op"] in PEERS:
                added[row["op"]][int(row["M"])] = float(row["extra_us"]) / 1e3
    lines = [Line(name="floor: the adapters' bytes", points=tuple(sorted(added.pop("floor").items())), is_dashed=True)]
    return lines + [Line(name=PEERS[key], points=tuple(sorted(points.items()))) for key, points in added.items()]


def _x(batch: float) -> float:
    return LEFT + math.log2(batch) / 8 * (WIDTH - LEFT - RIGHT)


def _y(value_ms: float) -> float:
    low, high = math.log10(TICKS_MS[0]), math.log10(TICKS_MS[-1])
    return HEIGHT - BOTTOM - (math.log10(value_ms) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 12, colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{text}</text>'


def _axes(title: str) -> list[str]:
    parts = [_text(LEFT, 24, title, anchor="start", size=15)]
    for tick in TICKS_MS:
        y = _y(tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{tick:g}", anchor="end"))
    for batch in (1, 8, 32, 64, 128, 256):
        parts.append(_text(_x(batch), HEIGHT - BOTTOM + 20, str(batch)))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "rows in the step"))
    parts.append(
        f'<g transform="translate(18 {HEIGHT / 2:.0f}) rotate(-90)">{_text(0, 0, "milliseconds added to the step")}</g>'
    )
    return parts


def _curve(line: Line, colour: str, label_y: float) -> list[str]:
    at = [(_x(batch), _y(value)) for batch, value in line.points if value > 0]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    dash = ' stroke-dasharray="6 4"' if line.is_dashed else ""
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>']
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in at]
    return [*parts, _text(WIDTH - RIGHT + 12, label_y, line.name, anchor="start", colour=colour)]


def draw(lines: list[Line], title: str) -> str:
    """Return the picture; labels stand in the order of the curves' right ends, apart from each other."""
    ends = sorted(range(len(lines)), key=lambda index: _y(lines[index].points[-1][1]))
    label_y, last = {}, -math.inf
    for index in ends:
        last = max(_y(lines[index].points[-1][1]) + 4, last + 16)
        label_y[index] = last
    body = _axes(title)
    for index, line in enumerate(lines):
        body += _curve(line, COLOURS[index], label_y[index])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *body, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="result files of benchmarks/layers.py, oldest first")
    parser.add_argument("--popularity", choices=("distinct", "zipf"), default="distinct")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    ours = our_line(args.results, args.popularity)
    lines = ([ours] if ours else []) + baseline_lines(args.popularity)
    what = "every row its own adapter" if args.popularity == "distinct" else "adapters drawn by Zipf's law"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(draw(lines, f"LoRA r16 on all projections of Llama-2-7B, one H100: {what}"))
    print(f"wrote {args.out}, {len(lines)} curves{'' if ours else '; no result file has ours'}")


if __name__ == "__main__":
    main()
