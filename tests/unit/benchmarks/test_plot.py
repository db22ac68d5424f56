"""The plot shows floor, peers and ours where they belong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "plot_added_step_time.py"


def plot(tmp_path: Path, popularity: str, *results: Path) -> ET.Element:
    out = tmp_path / "plot.svg"
    command = [sys.executable, str(SCRIPT), *map(str, results), "--popularity", popularity, "--out", str(out)]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    return ET.fromstring(out.read_text())


@pytest.mark.parametrize("popularity", ["distinct", "zipf"])
def test_floor_and_peers_lie_inside_the_picture(tmp_path: Path, popularity: str) -> None:
    picture = plot(tmp_path, popularity)

    curves = picture.findall("{*}polyline")
    assert len(curves) == 5
    points = [float(number) for curve in curves for number in re.split("[ ,]", curve.attrib["points"])]
    assert all(0 < x < 760 for x in points[0::2])
    assert all(0 < y < 440 for y in points[1::2])


def test_ours_comes_from_the_last_file_that_has_it(tmp_path: Path) -> None:
    def file(name: str, added_us: dict[str, float]) -> Path:
        rows = [{"case": case, "metric": "added", "value": value} for case, value in added_us.items()]
        path = tmp_path / name
        path.write_text(json.dumps({"rows": rows}))
        return path

    old = file("a.json", {"decode_stack/llama2-7b/64/all r16/distinct/64": 9000.0})
    new = file(
        "b.json",
        {
            "decode_stack/llama2-7b/1/all r16/distinct/1": 300.0,
            "decode_stack/llama2-7b/64/all r16/distinct/64": 2000.0,
            "decode_stack/llama2-7b/64/all r16/zipf/28": 1000.0,
        },
    )
    other = file("c.json", {"in_place/o/64/r16/distinct/64": 7.0})

    ours = plot(tmp_path, "distinct", old, new, other).findall("{*}polyline")[0].attrib["points"].split()

    zipf = plot(tmp_path, "zipf", new).findall("{*}polyline")[0].attrib["points"].split()
    assert len(ours) == len(zipf) == 2
    assert ours[0] == zipf[0]
    assert float(zipf[1].split(",")[1]) > float(ours[1].split(",")[1])  # less time is further down
