"""Builds what a release is made of into dist/: wheel, source archive, a bill of materials; and audits what it installs.

    python deploy/dist.py [--out DIR] [--no-audit]

The bill of materials (CycloneDX) lists what deploy/locks/serve.txt pins: everything that `loraplex[serve]` brings. The audit
asks PyPI's advisories about the same; where they cannot be reached it says so, names what was not audited, and succeeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
LOCK: Final = ROOT / "deploy" / "locks" / "serve.txt"
AUDIT_TIMEOUT_S: Final = 300
UNREACHABLE: Final = ("ConnectionError", "ServiceError", "Could not connect", "Timeout", "Max retries", "SSLError")
"""What pip-audit's last words have where it could not ask."""


class DistError(Exception):
    """A part of a release could not be made, or must not be shipped."""


def build(out: Path) -> tuple[Path, Path]:
    """Build wheel and source archive into a folder of nothing else; return both."""
    shutil.rmtree(out, ignore_errors=True)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)])
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def write_bill(wheel: Path) -> Path:
    """Write the bill of materials beside a wheel and return it.

    Raises:
        DistError: If it lacks a package of the lock.
    """
    bill = wheel.with_name(f"{'-'.join(wheel.name.split('-')[:2])}.cdx.json")
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", "--pyproject", str(ROOT / "pyproject.toml")]
    run([*command, "--output-reproducible", "--output-file", str(bill), str(LOCK)])
    listed = {part["name"] for part in json.loads(bill.read_text())["components"]}
    missing = [name for name in locked_names() if name not in listed]
    if missing:
        raise DistError(f"{bill.name} lacks {', '.join(missing)}")
    return bill


def locked_names() -> list[str]:
    """Return the packages that the lock pins."""
    return [line.partition("==")[0] for line in LOCK.read_text().splitlines() if "==" in line and line[0] != " "]


def audit() -> str:
    """Ask PyPI's advisories about what the lock pins; return what there is to say.

    Raises:
        DistError: If a package has a known vulnerability, or the audit fails though it could ask.
    """
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--disable-pip",
        "--require-hashes",
        "--format",
        "json",
        "-r",
        str(LOCK),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=AUDIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return not_audited(f"no answer within {AUDIT_TIMEOUT_S} s")
    if done.returncode and not done.stdout.strip():
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        if any(word in done.stderr for word in UNREACHABLE):
            return not_audited(last)
        raise DistError(f"pip-audit fails: {last}")
    found = json.loads(done.stdout)["dependencies"]
    vulnerable = [f"{p['name']} {p['version']}: {v['id']}" for p in found for v in p.get("vulns", [])]
    if vulnerable:
        raise DistError("known vulnerabilities:\n" + "\n".join(vulnerable))
    return f"audited {len(found)} packages of {LOCK.name}: no known vulnerability"


def not_audited(why: str) -> str:
    """Return what is said where the advisories could not be asked."""
    return f"NOT AUDITED: {len(locked_names())} packages of {LOCK.name}; the advisories cannot be reached: {why}"


def run(command: list[str]) -> None:
    """Run a command.

    Raises:
        DistError: If it fails, with what it said.
    """
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DistError(f"{' '.join(command[1:4])} fails:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def main() -> int:
    """Build, list and audit; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder; what it had is removed")
    parser.add_argument("--no-audit", action="store_true", help="do not ask for advisories")
    args = parser.parse_args()
    try:
        wheel, archive = build(args.out)
        print("\n".join(str(path) for path in (wheel, archive, write_bill(wheel))))
        if not args.no_audit:
            print(audit())
    except DistError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
