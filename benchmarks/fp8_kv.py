"""Decode attention over FP8 keys and values beside bf16, and what FP8 changes in a model's log probabilities.

    python benchmarks/fp8_kv.py --out benchmarks/results      # one H100 or H200: about 20 s
    python benchmarks/fp8_kv.py --smoke                       # no GPU: compiles the kernels
    python benchmarks/fp8_kv.py --error DIR --text README.md  # no GPU: a base model's error, in fp32

Attention: 64 sequences of 2,048 tokens, 8 KV heads, 4 query heads each, heads of 128, pages of 16 tokens in random order; four
layers in turn in one graph, L2 evicted before it, medians of 15 replays. `floor`: keys, values and scales at the rate of a copy.
Before it is timed, a result is compared with fp32 attention over what the pages hold.
Error: every next-token log probability of a text, over FP8 keys and values and over fp32 ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import numpy as np
import torch
from loraplex_bench.results import Results, Row, head_commit
from loraplex_bench.steps.attention_bench import HEAD_DIM, attention_us, layout_of
from loraplex_bench.steps.kernel_timer import copy_bytes_per_s
from loraplex_kernels.compiler import Build, compile_kernel
from loraplex_kernels.module import KernelLibrary

BATCH, CONTEXT = 64, 2048
CHUNK: Final = 256


def time_attention(results: Results) -> None:
    """Time both, beside the bytes that they must read."""
    device = torch.device("cuda", 0)
    library, flush = KernelLibrary(device, torch.bfloat16, dependent=True), torch.zeros(40 << 20, device=device)
    rate = copy_bytes_per_s()
    results.note(f"a copy reads and writes {rate / 1e12:.2f} TB/s")
    results.print_head()
    for name, is_fp8 in (("bf16", False), ("fp8", True)):
        value, read = attention_us(library, layout_of(is_fp8=is_fp8), flush, rows=BATCH, context=CONTEXT)
        case, floor = f"{BATCH}x{CONTEXT}/{name}", read / rate * 1e6
        results.add(Row(suite="fp8_kv", case=case, metric="time", value=value, unit="us", floor=floor))


def measure_error(model: Path, text: Path, results: Results) -> None:
    """Compare log probabilities over FP8 keys and values with those over fp32 ones."""
    from support.kv_error import logprobs_over  # of the test suite, for its harness
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text.read_text()).ids
    plain, fp8 = (logprobs_over(model, ids, kv_dtype=kv_dtype, chunk=CHUNK) for kv_dtype in ("", "fp8"))
    difference = np.abs(plain - fp8)
    results.note(
        f"{len(difference)} tokens of {text.name}, {model.name}; mean -log p {-plain.mean():.4f}, {-fp8.mean():.4f}"
    )
    results.print_head()
    for metric, value in (
        ("mean", difference.mean()),
        ("p99", np.quantile(difference, 0.99)),
        ("max", difference.max()),
    ):
        results.add(Row(suite="fp8_kv", case=f"error/{model.name}", metric=metric, value=float(value), unit="nats"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="compile for sm_90a, no GPU")
    parser.add_argument("--error", type=Path, help="a base model's folder")
    parser.add_argument(
        "--text", type=Path, default=Path("README.md"), help="text whose log probabilities are compared"
    )
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    if args.smoke:
        for is_fp8 in (False, True):
            defines = (f"HEAD_DIM={HEAD_DIM}", *layout_of(is_fp8=is_fp8).kv_defines, "LORAPLEX_PDL")
            program = compile_kernel(Build(name="attention_decode", defines=defines), "sm_90a")
            print(f"{defines}: {program.registers} registers, {program.spill_bytes} B spilled")
        return
    results = Results()
    if args.error:
        measure_error(args.error, args.text, results)
    else:
        time_attention(results)
    if args.out:
        results.write(args.out, "fp8-kv", commit=args.commit)


if __name__ == "__main__":
    main()
