"""Structured output on a whole engine: rows that draw under a JSON schema's masks, beside rows that draw freely.

    python benchmarks/structured.py --out benchmarks/results

64 rows of Llama-2-7B in bf16, random weights, over 32 adapters of rank 16 on q, k, v, o, each in the pool before the clock
starts; the same rows of the base model without LoRA beside them. It compares 64 structured rows with 64 plain rows, and 64
plain rows beside 64 structured ones with 64 beside 64 plain ones, by the median time between tokens and the tokens per
second. Kinds of rows take turns in each round, and each ratio is one round's. The vocabulary of 32,000 tokens is made in
code. ``--lexers 1,4,8`` compares numbers of lexers that the structured rows share, in one run. ``--smoke`` runs everything
on a tiny model and the torch backend.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex_bench.end_to_end.cases import setup_of
from loraplex_bench.end_to_end.context import Bench
from loraplex_bench.end_to_end.structured import PAIRS, QUICK_PAIRS, Sizes, TimedFiller, Variant, run_structured
from loraplex_bench.person_schema import SCHEMA
from loraplex_bench.results import head_commit
from loraplex_bench.shapes import LLAMA2_7B, AdapterFamily, Shape
from loraplex_bench.synthetic_tokenizer import write_tokenizer
from loraplex_common.structured_output import ConstraintKind, StructuredOutput
from loraplex_engine.constraints.compiler import Constraints, make_constraints
from loraplex_engine.constraints.limits import ConstraintLimits

if TYPE_CHECKING:
    from loraplex_bench.rig import RigSetup
    from loraplex_engine.constraints.types import CompiledConstraint


def gpu_setup() -> tuple[RigSetup, Sizes]:
    """Return the engine and the requests that are measured."""
    sizes = Sizes()
    setup = setup_of(LLAMA2_7B, AdapterFamily(), sizes.num_adapters, num_pages=30 * 2**30 // LLAMA2_7B.pool.page_bytes)
    return setup, sizes


def smoke_setup(folder: Path) -> tuple[RigSetup, Sizes]:
    """Return a tiny model's."""
    from loraplex_common.base_model import load_base_model
    from support.base_models import TinyBase, write_base_model

    model = write_base_model(folder, TinyBase())
    tiny = Shape(info=load_base_model(model, name="tiny"), pool_gib=2**-8, dtype="float32", model_dir=model)
    sizes = Sizes(num_rows=4, prompt_tokens=8, output_tokens=24, num_adapters=2)
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 64}
    return setup_of(tiny, AdapterFamily(ranks=(4,)), sizes.num_adapters, **limits), sizes


def run(setup: RigSetup, sizes: Sizes, bench: Bench, folder: Path, lexers: list[int]) -> None:
    """Compile the schema, once for each variant, start the engine and measure.

    Args:
        setup: The engine.
        sizes: What each request is.
        bench: Gets the results.
        folder: For the tokenizer.
        lexers: Most lexers of the schema, one entry per variant; empty: one variant, with those of an engine here.
    """
    vocab_size = setup.shape.info.vocab_size
    eos = write_tokenizer(folder, vocab_size)

    def make(limits: ConstraintLimits, num_threads: int | None = None) -> Constraints:
        return make_constraints(
            folder, vocab_size=vocab_size, eos_token_ids=(eos,), limits=limits, num_threads=num_threads
        )

    def compile_schema(name: str, constraints: Constraints) -> Variant:
        async def compile_and_close() -> CompiledConstraint:
            try:
                wanted = StructuredOutput(kind=ConstraintKind.JSON_SCHEMA, text=json.dumps(SCHEMA))
                return await constraints.compiler.compile(wanted)
            finally:
                await constraints.close()

        began_s = time.perf_counter()
        variant = Variant(name=name, constraint=asyncio.run(compile_and_close()))
        bench.results.note(
            f"the schema compiled in {time.perf_counter() - began_s:.2f} s, the tokenizer's part included"
        )
        return variant

    here = make(ConstraintLimits(), max(lexers, default=None))
    variants = [compile_schema(f"lexers {most}", make(ConstraintLimits(max_lexers=most), most)) for most in lexers]
    variants = variants or [compile_schema("", here)]
    filler = TimedFiller(here.filler)
    setup = replace(setup, limits=replace(setup.limits, eos_token_ids=(eos,)))
    with bench.new_rig(setup, filler=filler) as rig:
        run_structured(bench, rig, sizes, variants, filler=filler, pairs=QUICK_PAIRS if lexers else PAIRS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model and the torch backend, without a GPU")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median counts")
    parser.add_argument("--lexers", default="", help="compare so many lexers of the schema, such as 1,4,8; fewer mixes")
    args = parser.parse_args()
    lexers = [int(most) for most in args.lexers.split(",") if most]
    bench = Bench(repeats=args.repeats)
    bench.results.print_head()
    with tempfile.TemporaryDirectory() as folder:
        setup, sizes = smoke_setup(Path(folder) / "model") if args.smoke else gpu_setup()
        try:
            run(setup, sizes, bench, Path(folder) / "tokenizer", lexers)
        finally:
            bench.release()
            if args.out and bench.results.rows:
                bench.results.write(args.out, "structured", commit=args.commit)


if __name__ == "__main__":
    main()
