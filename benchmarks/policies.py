"""What the scheduling and memory policies reach, each figure with its bound; exit code 0 only if all hold.

    python benchmarks/policies.py [--only overload --only thrash] [--out benchmarks/results]

Simulated figures come from the engine's own scheduler, pool and caches over a device that only costs time
(docs/adr/0016-simulator.md); they need no GPU and are the same on every machine. ``cost``, ``replay`` and ``real`` measure
this machine; ``error`` compares the simulator with measurements of the real engine in benchmarks/results and says so where
there are none. The last line sums up.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_bench.policies import cost, economy, error, fairness, overload, real, replay, thrash
from loraplex_bench.policies.figures import Report
from loraplex_bench.results import Results, head_commit

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent

SECTIONS: Final[dict[str, Callable[[Report], None]]] = {
    "overload": overload.run,
    "fairness": fairness.run,
    "thrash": thrash.run,
    "economy": economy.run,
    "cost": cost.run,
    "replay": replay.run,
    "error": error.run,
    "real": real.run,
}


def main() -> int:
    """Run the sections asked for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="a section; may be given again")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--images", type=Path, default=HERE.parent / "docs" / "img", help="folder for the plots")
    parser.add_argument(
        "--replay-requests", type=int, help="a shorter replay, whose figure then counts as not measured"
    )
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    report = Report(images=args.images, replay_requests=args.replay_requests)
    report.print_head()
    try:
        for name in args.only or SECTIONS:
            began_s = time.perf_counter()
            SECTIONS[name](report)
            report.note(f"{name}: {time.perf_counter() - began_s:.0f} s")
    finally:
        if args.out and report.figures:  # what was measured before a failure is not lost
            results = Results()
            results.rows = [figure.row for figure in report.figures if figure.is_measured]
            results.notes = [*report.notes, report.summary]
            results.write(args.out, "policies", commit=args.commit)
    print(report.summary)
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
