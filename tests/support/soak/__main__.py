"""Run a soak from the command line: see the package."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from loraplex_common.descriptors import raise_limit
from support.soak.run import Plan, soak


def main() -> int:
    """Run a soak and write its report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=None, help="default: from the clock")
    parser.add_argument("--directory", type=Path, default=None, help="empty; where logs stay (default: nowhere)")
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="where to write what came of it")
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    raise_limit()
    plan = Plan(arguments.minutes, seed, commit)
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        report = asyncio.run(soak(arguments.directory or Path(temporary), plan))
    text = json.dumps(report.as_json(), indent=2)
    print(text)
    if arguments.results is not None:
        (arguments.results / f"soak_{commit[:12]}_{seed}.json").write_text(text + "\n")
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
