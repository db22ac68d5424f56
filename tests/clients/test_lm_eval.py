"""lm-evaluation-harness scores an adapter through /v1/completions as transformers and peft score it."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.demo_model import DEMO_ADAPTERS
from support.oracle import Oracle
from support.stack_fixtures import import_all
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from support.stack import Stack

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]

TASK_DIR = Path(__file__).parent / "choices_task"
ADAPTER = "sentiment"
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def samples(clients_python: Path, smol_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the harness recorded of each item, in the order of the items."""
    import_all(smol_stack)
    home = tmp_path_factory.mktemp("lm-eval")
    url = f"http://{smol_stack.gateway.addresses['http']}/v1/completions"
    model_args = f"model={ADAPTER},base_url={url},tokenizer={smol_stack.model},tokenizer_backend=huggingface"
    command = [str(clients_python), "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model_args]
    command += ["--tasks", "loraplex_choices", "--include_path", ".", "--batch_size", "16"]
    command += ["--log_samples", "--output_path", str(home / "results")]
    offline = {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    result = subprocess.run(
        command, cwd=TASK_DIR, env={**os.environ, **offline}, capture_output=True, text=True, check=False, timeout=1200
    )
    assert result.returncode == 0, result.stderr[-4000:]
    (file,) = (home / "results").rglob("samples_*.jsonl")
    found: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(found, key=lambda sample: int(sample["doc_id"]))


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASK_DIR / "items.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def scores(items: list[dict[str, Any]], smol_stack: Stack) -> list[list[tuple[float, bool]]]:
    """(log-likelihood, whether it is the greedy continuation) of every choice of every item, by transformers and peft."""
    oracle = Oracle(smol_stack.model, {ADAPTER: DEMO_ADAPTERS[ADAPTER]})
    tokenizer = Tokenizer.from_file(str(smol_stack.model / "tokenizer.json"))

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return found

    @functools.cache  # choices share their beginnings, and many questions come again
    def logprobs_after(token_ids: tuple[int, ...], num_context: int) -> NDArray[np.float64]:
        """Return the log-probabilities of the choice's places, ``[places, vocab]``."""
        logits = oracle.logits(token_ids, ADAPTER)[num_context - 1 :].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        found: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return found

    def score(query: str, choice: str) -> tuple[float, bool]:
        whole, num_context = ids(query + choice), len(ids(query))
        logprobs, chosen = logprobs_after(tuple(whole[:-1]), num_context), whole[num_context:]
        is_greedy = all(int(row.argmax()) == token_id for row, token_id in zip(logprobs, chosen, strict=True))
        return float(sum(row[token_id] for row, token_id in zip(logprobs, chosen, strict=True))), is_greedy

    return [[score(item["query"], choice) for choice in item["choices"]] for item in items]


def test_the_items_are_what_their_script_makes() -> None:
    made = subprocess.run([sys.executable, TASK_DIR / "make_items.py"], capture_output=True, text=True, check=True)

    assert made.stdout == (TASK_DIR / "items.jsonl").read_text()


def test_accuracy_and_each_choice_are_those_of_transformers(
    items: list[dict[str, Any]], samples: list[dict[str, Any]], scores: list[list[tuple[float, bool]]]
) -> None:
    assert len(samples) == len(items) == 200
    right: list[bool] = []
    for item, sample, expected in zip(items, samples, scores, strict=True):
        assert sample["doc"]["query"] == item["query"]
        found = [(float(score), str(is_greedy) == "True") for ((score, is_greedy),) in sample["resps"]]
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=TOLERANCE), item
        assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected], item
        chosen = int(np.argmax([score for score, _ in expected]))
        assert int(np.argmax([score for score, _ in found])) == chosen, item
        right.append(chosen == item["label"])
        assert sample["acc"] == float(right[-1]), item

    accuracy = sum(right) / len(right)
    assert sum(sample["acc"] for sample in samples) / len(samples) == accuracy
    assert 0.4 < accuracy < 1.0, "a task that is always or never solved compares nothing"
