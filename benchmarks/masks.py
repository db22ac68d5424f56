"""What the rules of structured rows cost a step on the host, without an engine: taking tokens in, and filling masks.

    python benchmarks/masks.py --vocabularies 32000,128000 --threads 1,2 --out benchmarks/results

64 outputs of the JSON schema of `structured.py` draw allowed tokens, each as likely as any other, as random weights do: all
begin at once, so their dearest places come at once too. Measured is one step, from the tokens to the filled masks: its wall
time, as the step loop's thread has it, and the processor time of all threads, which a busy machine hardly changes. A schema has as many lexers as there are threads, up to ``--lexers``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_bench.person_schema import SCHEMA
from loraplex_bench.results import Results, Row, head_commit
from loraplex_bench.synthetic_tokenizer import write_tokenizer
from loraplex_common.structured_output import ConstraintKind, StructuredOutput
from loraplex_engine.constraints.compiler import Constraints, make_constraints
from loraplex_engine.constraints.limits import ConstraintLimits
from loraplex_engine.constraints.output_rules import OutputRules, fill_masks

if TYPE_CHECKING:
    from loraplex_engine.constraints.types import CompiledConstraint
    from numpy.typing import NDArray

NUM_ROWS: Final = 64
SUITE: Final = "masks"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one walk is.

    Attributes:
        vocab_size: Tokens of the vocabulary.
        num_threads: Threads that fill masks.
        max_lexers: Most lexers of the schema.
        num_steps: Tokens of each output.
    """

    vocab_size: int
    num_threads: int
    max_lexers: int
    num_steps: int


async def compile_schema(constraints: Constraints) -> CompiledConstraint:
    """Return the compiled schema."""
    try:
        wanted = StructuredOutput(kind=ConstraintKind.JSON_SCHEMA, text=json.dumps(SCHEMA))
        return await constraints.compiler.compile(wanted)
    finally:
        await constraints.close()


def walk(case: Case, folder: Path, results: Results) -> None:
    """Walk through the schema and note what the steps take."""
    eos = write_tokenizer(folder, case.vocab_size)
    limits = ConstraintLimits(max_lexers=case.max_lexers)
    constraints = make_constraints(
        folder, vocab_size=case.vocab_size, eos_token_ids=(eos,), limits=limits, num_threads=case.num_threads
    )
    compiled = asyncio.run(compile_schema(constraints))
    rules = [OutputRules(compiled.start(()), eos_token_ids=(eos,)) for _ in range(NUM_ROWS)]
    masks = np.zeros((NUM_ROWS, (case.vocab_size + 31) // 32), dtype=np.int32)
    rng = np.random.default_rng(0)
    fill_masks(rules, masks, constraints.filler)
    accepts_ms, fills_ms, cpu_ms = [], [], []
    for _ in range(case.num_steps):
        token_ids = _draw(masks, rng)
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        for output, token_id in zip(rules, token_ids, strict=True):
            output.accept(token_id)
        accepted_s = time.perf_counter()
        fill_masks(rules, masks, constraints.filler)
        fills_ms.append((time.perf_counter() - accepted_s) * 1e3)
        cpu_ms.append((time.process_time() - began_cpu_s) * 1e3)
        accepts_ms.append((accepted_s - began_s) * 1e3)
    steps_ms = [accept + fill for accept, fill in zip(accepts_ms, fills_ms, strict=True)]
    name = f"rows:{NUM_ROWS}/vocabulary:{case.vocab_size}/threads:{case.num_threads}"
    for part, times in (("accept", accepts_ms), ("fill", fills_ms), ("step", steps_ms), ("step_cpu", cpu_ms)):
        p99 = float(np.percentile(times, 99))
        results.add(Row(suite=SUITE, case=name, metric=f"{part}_mean", value=statistics.mean(times), unit="ms"))
        results.add(Row(suite=SUITE, case=name, metric=f"{part}_p99", value=p99, unit="ms"))


def _draw(masks: NDArray[np.int32], rng: np.random.Generator) -> list[int]:
    allowed = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    return [int(rng.choice(np.flatnonzero(row))) for row in allowed]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=_numbers, default=[32_000, 128_000], help="sizes")
    parser.add_argument("--threads", type=_numbers, default=[1, 2], help="threads that fill masks")
    parser.add_argument("--lexers", type=int, default=ConstraintLimits().max_lexers, help="most lexers of the schema")
    parser.add_argument("--steps", type=int, default=400, help="tokens of each output")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    results = Results()
    results.note(f"{len(os.sched_getaffinity(0))} cores, at most {args.lexers} lexers")
    results.print_head()
    for vocab_size in args.vocabularies:
        for num_threads in args.threads:
            case = Case(vocab_size=vocab_size, num_threads=num_threads, max_lexers=args.lexers, num_steps=args.steps)
            with tempfile.TemporaryDirectory() as folder:
                walk(case, Path(folder), results)
    if args.out:
        results.write(args.out, SUITE, commit=args.commit)


if __name__ == "__main__":
    main()
