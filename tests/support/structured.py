"""Requests for structured outputs of a tiny model, and what their outputs must be."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.structured_output import ConstraintKind, StructuredOutput
from loraplex_engine.messages import FinishReason
from loraplex_engine.rpc.rule_making import RuleMaker
from loraplex_engine.sampling_params import SamplingParams
from support.scheduler_rig import make_submission

if TYPE_CHECKING:
    from loraplex_engine.constraints.compiler import Constraints
    from support.engine_harness import EngineHarness, Generation
    from tokenizers import Tokenizer

VOCAB_SIZE = 400
EOS = (1, 3)
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["a", "bc"]}},
    "required": ["n", "kind"],
    "additionalProperties": False,
}
PATTERN = r"[a-f]{3}-\d{2}"
CHOICES = ["yes", "no", "perhaps"]
WANTED = (
    StructuredOutput(kind=ConstraintKind.JSON_SCHEMA, text=json.dumps(SCHEMA)),
    StructuredOutput(kind=ConstraintKind.REGEX, text=PATTERN),
    StructuredOutput(kind=ConstraintKind.CHOICE, text=json.dumps(CHOICES)),
)


def submit_all(
    harness: EngineHarness, constraints: Constraints, jobs: list[dict[str, object]], *, max_new_tokens: int = 60
) -> list[Generation]:
    """Submit requests; ``wanted``, ``bans`` and ``resumed`` of each become its rules."""

    async def rules_of(job: dict[str, object]) -> object:
        submission = make_submission(
            structured_output=job.get("wanted"),
            bad_token_sequences=job.get("bans", ()),
            resumed=job.get("resumed", []),  # type: ignore[arg-type]
        )
        return await RuleMaker(constraints.compiler, EOS).make(submission)

    async def all_rules() -> list[object]:
        return [await rules_of(job) for job in jobs]

    rules = asyncio.run(all_rules())
    return [
        harness.submit(
            job.get("prompt", [9, 8, 7]),  # type: ignore[arg-type]
            max_new_tokens=max_new_tokens,
            ignore_eos=False,
            sampling=job.get("sampling", SamplingParams(temperature=0.0)),  # type: ignore[arg-type]
            rules=each if "wanted" in job or "bans" in job else None,
            resumed_token_ids=np.array(job.get("resumed", []), dtype=np.int32),
        )
        for job, each in zip(jobs, rules, strict=True)
    ]


def jobs_of(count: int) -> list[dict[str, object]]:
    """Return requests of every kind, one in four without rules, at temperatures from 0 to 2."""
    jobs: list[dict[str, object]] = []
    for number in range(count):
        temperature = (0.0, 0.7, 1.0, 2.0)[number // 4 % 4]
        job: dict[str, object] = {
            "prompt": [9, 8, 7, 20 + number % 5],
            "sampling": SamplingParams(temperature=temperature, seed=number, repetition_penalty=1.0 + number % 3 / 10),
        }
        if number % 4 < 3:
            job["wanted"] = WANTED[number % 4]
        jobs.append(job)
    return jobs


def is_valid(wanted: StructuredOutput, text: str) -> bool:
    if wanted.kind is ConstraintKind.REGEX:
        return re.fullmatch(PATTERN, text) is not None
    if wanted.kind is ConstraintKind.CHOICE:
        return text in CHOICES
    value = json.loads(text)
    return set(value) == {"n", "kind"} and 0 <= value["n"] <= 99 and value["kind"] in ("a", "bc")


def check_valid(jobs: list[dict[str, object]], generations: list[Generation], tokenizer: Tokenizer) -> int:
    """Assert that no output which ended by itself is invalid; returns how many did."""
    num_ended = 0
    for job, generation in zip(jobs, generations, strict=True):
        assert generation.end is not None
        assert generation.end.error is None
        wanted = job.get("wanted")
        if isinstance(wanted, StructuredOutput) and generation.end.finish_reason is FinishReason.STOP:
            text = tokenizer.decode(generation.tokens, skip_special_tokens=True)
            assert is_valid(wanted, text), text
            num_ended += 1
    return num_ended
