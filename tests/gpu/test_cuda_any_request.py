"""The CUDA backend, too, answers every mix of legal values of every option as asked; it hurts no other request."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from support.any_request import EOS_IDS, MAX_BATCHED_TOKENS, MAX_MODEL_LEN, VOCAB_SIZE
from support.base_models import write_base_model
from support.cuda_rig import BASES, cuda_engine
from support.request_campaign import run_campaign_on

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
NUM_REQUESTS = int(os.environ.get("LORAPLEX_TEST_REQUESTS", "2000"))
SEED = int(os.environ.get("LORAPLEX_TEST_SEED", "12"))
NUM_PAGES = 48
"""Pages of the pool: too few for 12 requests of 4 blocks, some with an adapter, at once."""


async def test_random_requests_are_answered_as_asked_and_disturb_no_stranger(tmp_path: Path) -> None:
    model = write_base_model(tmp_path / "tiny", replace(BASES["gqa"], vocab_size=VOCAB_SIZE))
    engine = partial(
        cuda_engine,
        model,
        "float32",
        num_pages=NUM_PAGES,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        eos_token_ids=EOS_IDS,
    )

    tally = await run_campaign_on(engine, model, num_requests=NUM_REQUESTS, seed=SEED)

    assert not tally.wrong, f"{len(tally.wrong)} wrong of {NUM_REQUESTS} with seed {SEED}: {tally.wrong[:3]}"
    assert tally.num_requests == NUM_REQUESTS
    assert tally.num_strangers >= NUM_REQUESTS // 50, "strangers' streams ran all the while"
