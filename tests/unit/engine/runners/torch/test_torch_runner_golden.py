"""The real demo model on hand-made plans gives golden.json's tokens, whatever is in the batch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from support.demo_model import DEMO_ADAPTERS, GOLDEN, smollm2_dir
from support.oracle import make_rig

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["smollm2_dir"]


def test_golden_tokens_come_out_of_one_batch_of_all_adapters(smollm2_dir: Path) -> None:
    cases = json.loads(GOLDEN.read_text())["cases"]
    rig = make_rig(smollm2_dir, DEMO_ADAPTERS, num_pages=260, max_num_seqs=40, max_model_len=256)
    rng = np.random.default_rng(0)
    sequences = [
        rig.harness.add(case["prompt_ids"], adapter=rig.adapters[case["adapter"]], chunks=[int(rng.integers(1, 12))])
        for case in cases
    ]

    drawn = rig.harness.generate([sequences[i] for i in rng.permutation(len(cases))], 40, eos=2)

    assert len(drawn) == 40
    for case, sequence in zip(cases, sequences, strict=True):
        assert sequence.drawn == case["token_ids"], (case["adapter"], case["prompt"])
    rig.runner.close()
