"""What merging an adapter into the base's weights wins at most, by arithmetic, and what it changes in the answers.

    python benchmarks/merging.py --out benchmarks/results [--model DIR] [--cases N]     # CPU, one thread: about 6 minutes

`llama2-7b`: the model of `loraplex_bench.pair_ways` on a decode step and on prompts of one adapter, at one H200's ceilings.
`smollm2-135m`: the five adapters of examples/demo, in bf16 as engines compute (fp32 accumulators, one rounding per
projection). Each prompt of golden.json is answered greedily with the pair *apart*; then the same tokens are computed again:
*apart*, as one prompt (what another order of the same arithmetic changes: the noise), *merged*, ``bf16(W + s B A) x``, and,
of answers of the base, *unmerged*: ``bf16(W + s B A) x - s B A x``, as rows without the adapter would need it. A token is
changed if another one is drawn at its place, an output if any of its tokens is; *same order* compares with the answer's own way
computed as one prompt too. `rounding` is the norm of what bf16 takes from
W + s B A, as a share of the norm of s B A.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from loraplex_bench.pair_ways import PairShape, Way, cost_of, rank_bound, rows_bound, saved_by_merging
from loraplex_bench.paths import ROOT
from loraplex_bench.results import Results, Row, head_commit
from loraplex_bench.rounding import AdaptedModel
from loraplex_bench.shapes import LLAMA2_7B

if TYPE_CHECKING:
    from torch import Tensor

DEMO: Final = ROOT / "examples" / "demo"
ADAPTERS: Final = ("json", "devil", "kjv", "upper", "sentiment")
NUM_NEW_TOKENS: Final = 64


def add(results: Results, case: str, metric: str, value: float, unit: str) -> None:
    """Add a row."""
    results.add(Row(suite="merging", case=case, metric=metric, value=value, unit=unit))


def add_arithmetic(results: Results) -> None:
    """Add what the model of costs says of Llama-2-7B with rank 16 and 64 on all projections."""
    projections = [each for layer in LLAMA2_7B.geometry.layers for each in layer]
    for rank in (16, 64):
        for rows in (1, 64, 256, 2048, 8192):
            shapes = [PairShape(each.in_features, each.out_features, rank, rows) for each in projections]
            case = f"llama2-7b/r{rank}/{rows} rows of one adapter"
            for way in Way:
                milliseconds = sum(cost_of(way, shape).seconds() for shape in shapes) * 1e3
                add(results, case, f"products, {way.value}", milliseconds, "ms")
            add(results, case, "saved by merging at most", saved_by_merging(shapes), "share")
    for each in LLAMA2_7B.geometry.layers[0]:
        case = f"llama2-7b/{each.name}"
        add(results, case, "rank bound", rank_bound(each.in_features, each.out_features), "rank")
        add(results, case, "rows bound, r16", rows_bound(each.in_features, each.out_features, 16), "rows")


class Changes:
    """What one way changes in answers that another gave."""

    def __init__(self) -> None:
        self.tokens = self.changed_tokens = self.outputs = self.changed_outputs = self.beside = 0
        self.largest: list[float] = []

    def compare(self, answer: list[int], expected: Tensor, found: Tensor) -> None:
        """Compare logits ``[tokens, vocabulary]`` at the places where an answer's tokens were drawn."""
        changed = int((found.argmax(dim=1) != torch.tensor(answer)).sum())
        self.beside += int((found.argmax(dim=1) != expected.argmax(dim=1)).sum())
        self.tokens += len(answer)
        self.changed_tokens += changed
        self.outputs += 1
        self.changed_outputs += changed > 0
        self.largest.append(float((found - expected).abs().max()))

    def add_rows(self, results: Results, case: str) -> None:
        """Add the figures."""
        add(results, case, "tokens changed", self.changed_tokens / self.tokens, "share")
        add(results, case, "tokens changed, same order", self.beside / self.tokens, "share")
        add(results, case, "outputs changed", self.changed_outputs / self.outputs, "share")
        add(results, case, "largest logit difference, median", float(torch.tensor(self.largest).median()), "logits")
        add(results, case, "largest logit difference", max(self.largest), "logits")


def answer_and_compare(
    model: AdaptedModel, prompt: list[int], first: str, others: tuple[str, ...]
) -> dict[str, tuple[Any, ...]]:
    """Answer a prompt one way and compute the answer's logits again in that and in other ways."""
    answer = model.generate(first, prompt, NUM_NEW_TOKENS)
    logits = {way: model.logits(way, prompt + answer)[len(prompt) - 1 : -1] for way in (first, *others)}
    return {way: (answer, logits[first], found) for way, found in logits.items()}


def add_answers(results: Results, model_dir: Path, max_cases: int) -> None:
    """Add what merging changes in answers of the demo's adapters and of the base beside them."""
    cases = json.loads((DEMO / "golden.json").read_text())["cases"]
    changes = {way: Changes() for way in ("apart, as one prompt", "merged", "base, as one prompt", "unmerged")}
    for name in ADAPTERS:
        model = AdaptedModel(model_dir, DEMO / "adapters" / name)
        add(results, f"smollm2-135m/{name}", "rounding", model.rounding(), "share")
        for case in [each for each in cases if each["adapter"] == name][:max_cases]:
            of_adapter = answer_and_compare(model, case["prompt_ids"], "apart", ("merged",))
            of_base = answer_and_compare(model, case["prompt_ids"], "base", ("unmerged",))
            changes["apart, as one prompt"].compare(*of_adapter["apart"])
            changes["merged"].compare(*of_adapter["merged"])
            changes["base, as one prompt"].compare(*of_base["base"])
            changes["unmerged"].compare(*of_base["unmerged"])
    for way, found in changes.items():
        results.note(
            f"{way}: {found.changed_tokens} of {found.tokens} tokens, {found.changed_outputs} of {found.outputs} outputs"
        )
        found.add_rows(results, f"smollm2-135m/{way}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="SmolLM2-135M-Instruct; the demo's, fetched if need be, if unset")
    parser.add_argument("--cases", type=int, default=8, help="prompts of each adapter")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results()
    results.print_head()
    add_arithmetic(results)
    if args.model is None:
        from support.demo_model import find_demo_model

        args.model = find_demo_model()
    add_answers(results, args.model, args.cases)
    if args.out:
        results.write(args.out, "merging", commit=args.commit)


if __name__ == "__main__":
    main()
