"""Writes benchmarks/results/README.md: every result file with what it holds, where and when it was measured, what cites it.

    python benchmarks/index_results.py [--check]

With ``--check`` nothing is written; the exit code is 1 if the index is out of date.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
DOCUMENTS: Final = ("*.md", "docs/**/*.md", "benchmarks/*.md", "kernels/*.md")
WHAT: Final = {
    "adapters": "random mixtures of adapters of every method on one engine, compared with PEFT",
    "adapter-kinds": "kinds of adapters in a decode step: DoRA, (IA)3, SHiRA beside LoRA; loads beside steps",
    "cpu_vs_peft": "output rate beside transformers + peft",
    "dense-products": "bf16 products of few rows by our kernel beside cuBLAS's, and whole decode steps with either",
    "engine": "the engine on whole workloads: bursts, traces, start",
    "fp8-kv": "decode attention over FP8 keys and values beside bf16",
    "fp8-products": "FP8 products and the kernels that quantise their inputs, beside bf16 products",
    "fp8-step": "a decode step with FP8 weights beside its bytes, and beside its products and attention timed alone",
    "gateway": "a gateway alone: open, with identity, with quotas",
    "gateway-observed": "what usage ledger, metrics and traces cost a gateway, beside an older one or one with them off",
    "gateway-streams": "events a second through a gateway, over SSE and gRPC, by number of workers",
    "kernels": "kernels alone, beside their floors and peers",
    "layers": "LoRA inside a decode layer: time added to a step",
    "merging": "what merging an adapter into the base wins at most, and what it changes in answers",
    "mixed-steps": "steps with decode rows beside prompts",
    "names": "very many names: a store and a gateway under calls at a steady rate, memory, restarts",
    "policies": "scheduling and memory policies, mostly simulated",
    "prefill-cuts": "prefill LoRA, each way to cut its work",
    "profile": "where a step's time goes, kernel by kernel",
    "fuzz": "mutated files and streams at all that reads what strangers send, by target and outcome",
    "proxy-waits": "requests that wait in silence behind proxies, longer than proxies wait by default",
    "pushes": "a trainer's pushes under streams, every token compared with peft's of its revision",
    "quotas": "a gateway with limits on everything beside one without",
    "rank-kills": "ranks of a tensor-parallel engine killed during decode, loads, start and idleness",
    "ranks": "adapters evicted, replaced and pushed under load of tensor-parallel ranks, every token compared with peft's",
    "replicas": "two stores, one of which is killed every few seconds under streams",
    "request_campaign": "random requests against one engine",
    "rolling-restart": "gateways restarted one after another behind proxies, under streams that know the proxy alone",
    "sampling": "sampling on the device",
    "several-adapters": "rows that add several adapters up, and large ranks, beside rows of one adapter",
    "soak": "random faults against a fleet, every answer checked",
    "steps": "single steps, to which the simulator is fitted",
    "sparse-kernel": "the kernel of sparse deltas alone, ways to build it",
    "store": "the adapter store's rates: imports, Valkey, host memory and disk to an engine, beside plain copies",
    "store-kills": "store and Valkey killed at any step of imports, pushes, moves, deletions and deliveries",
    "structured-": "rows that draw under masks, beside plain rows",
    "structured": "random JSON Schemas on one engine, every output validated",
    "tools": "random strict functions through adapters of every tool format, every call validated",
    "upgrade": "a stack of an earlier commit, replaced part by part under streams",
}
"""Start of a file's name -> what such files hold."""
HEAD: Final = """# Results

Every file that a benchmark wrote and a text or a rate rests on. Written by `python benchmarks/index_results.py` (`make fmt` runs it,
`make check` compares); `benchmarks/compare_results.py A B` compares two files. A dash: the file does not say.

| file | what | measured on | date | commit | command | cited in |
| --- | --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What the index says of one file; empty where the file does not say it."""

    what: str
    machine: str
    date: str
    commit: str
    command: str


def read_entry(path: Path) -> Entry:
    """Return what a result file says of itself.

    Raises:
        ValueError: If no description fits the file's name.
    """
    kind = max((kind for kind in WHAT if path.name.startswith(kind)), key=len, default="")
    if not kind:
        raise ValueError(f"{path.name}: no description for such files; add one to WHAT in {Path(__file__).name}")
    found = json.loads(path.read_text())
    meta = found.get("meta", found)
    machine = meta.get("gpu") or meta.get("machine") or meta.get("cpu") or ""
    return Entry(
        what=WHAT[kind],
        machine="CPU" if machine == "none" else machine,
        date=str(meta.get("date", ""))[:10],
        commit=re.sub(r"\b([0-9a-f]{7})[0-9a-f]{5,33}\b", r"\1", str(meta.get("commit", ""))),
        command=command_of(kind, meta),
    )


def command_of(kind: str, meta: dict[str, Any]) -> str:
    """Return the command that wrote a file, without the options that say where to."""
    if kind == "soak":
        return f'make soak SOAK_ARGS="--minutes {meta["minutes"]:.0f} --seed {meta["seed"]}"'
    if kind == "gateway" and "command" not in meta:
        options = " ".join(f"--{name} {meta[name]}" for name in ("streams", "tokens", "clients"))
        return f"benchmarks/gateway.py {options}"
    return re.sub(r" --(out|commit|images|output) \S+", "", str(meta.get("command", ""))).removeprefix("python ")


def cited_in(names: list[str]) -> dict[str, list[Path]]:
    """Return the documents that cite each file, by its name or by a pattern such as ``{a,b}-2026*.json``."""
    cited: dict[str, list[Path]] = {name: [] for name in names}
    for document in sorted({path for pattern in DOCUMENTS for path in ROOT.glob(pattern)}):
        patterns = [
            expanded for found in re.findall(r"[\w{},*.-]+\.json", document.read_text()) for expanded in expand(found)
        ]
        for name in names:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns if pattern != "*.json"):
                cited[name].append(document)
    return cited


def expand(pattern: str) -> list[str]:
    """Return the patterns that one with braces stands for, as a shell would."""
    parts = [part[1:-1].split(",") if part.startswith("{") else [part] for part in re.split(r"(\{[^}]*\})", pattern)]
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def index_of(folder: Path) -> str:
    """Return the text of the index of a folder of result files.

    Raises:
        ValueError: If no description fits a file's name.
    """
    paths = sorted(folder.glob("*.json"))
    cited = cited_in([path.name for path in paths])
    lines = []
    for path in paths:
        entry = read_entry(path)
        links = ", ".join(
            f"[{document.relative_to(ROOT)}]({Path(os.path.relpath(document, folder)).as_posix()})"
            for document in cited[path.name]
        )
        command = f"`{entry.command}`" if entry.command else ""
        cells = (f"[{path.name}]({path.name})", entry.what, entry.machine, entry.date, entry.commit, command, links)
        lines.append("| " + " | ".join(cell or "-" for cell in cells) + " |\n")
    return HEAD + "".join(lines)


def main() -> int:
    """Write or check the index; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the index is out of date")
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "results", help="the result files")
    args = parser.parse_args()
    index, text = args.folder / "README.md", index_of(args.folder)
    if not args.check:
        index.write_text(text)
    elif not index.exists() or index.read_text() != text:
        print(f"{index} is out of date; run: python benchmarks/{Path(__file__).name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
