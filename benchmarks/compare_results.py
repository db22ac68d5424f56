"""Compares two result files row by row: how far apart two runs of the same cases are.

    python benchmarks/compare_results.py benchmarks/results/engine-A.json benchmarks/results/engine-B.json --limit 0.02

Prints each row that both have, with the second relative to the first. With ``--limit`` the exit code is 1 if any row of
the chosen metrics differs by more.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

METRICS = ("out_tok_per_s", "added", "products", "with_pointwise", "op", "step", "tpot_p50_ms")
"""What a run should repeat; counts, shares and percentiles of few requests vary more."""


def read(path: Path) -> dict[tuple[str, str, str], float]:
    """Return (suite, case, metric) -> value."""
    rows = json.loads(path.read_text())["rows"]
    return {(row["suite"], row["case"], row["metric"]): row["value"] for row in rows}


def differences(
    first: dict[tuple[str, str, str], float], second: dict[tuple[str, str, str], float], metrics: tuple[str, ...]
) -> dict[tuple[str, str, str], float]:
    """Return, for rows that both have, ``second / first - 1``."""
    shared = [key for key in first if key in second and key[2] in metrics and first[key]]
    return {key: second[key] / first[key] - 1 for key in shared}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--metrics", nargs="+", default=list(METRICS))
    parser.add_argument("--limit", type=float, help="largest difference allowed, e.g. 0.02")
    args = parser.parse_args()
    first, second = read(args.first), read(args.second)
    found = differences(first, second, tuple(args.metrics))
    if not found:
        sys.exit("the files share no row of these metrics")
    for key, difference in sorted(found.items(), key=lambda item: -abs(item[1])):
        print(f"{'/'.join(key):<90} {first[key]:>12,.2f} {second[key]:>12,.2f} {difference:>+8.2%}")
    beyond = [key for key, difference in found.items() if args.limit is not None and abs(difference) > args.limit]
    print(f"{len(found)} rows, largest difference {max(map(abs, found.values())):.2%}, {len(beyond)} beyond the limit")
    sys.exit(1 if beyond else 0)


if __name__ == "__main__":
    main()
