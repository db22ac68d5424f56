"""A stack that runs already (compose, Kubernetes, `make serve`) with the demo's model and adapters does its main job.

``LORAPLEX_SMOKE_TARGET=HOST:PORT [LORAPLEX_SMOKE_HTTP=HOST:PORT] pytest tests/smoke``; skipped without a target.
The engine has to compute in fp32, as it does on a CPU.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from loraplex_client import AsyncClient, Finished
from loraplex_common.errors import AdapterNotFoundError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TARGET = os.environ.get("LORAPLEX_SMOKE_TARGET", "")
HTTP = os.environ.get("LORAPLEX_SMOKE_HTTP", "")
GOLDEN = Path(__file__).resolve().parents[2] / "examples" / "demo" / "golden.json"

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not TARGET, reason="no running stack: LORAPLEX_SMOKE_TARGET is not set"),
]


@pytest.fixture
async def client() -> AsyncIterator[AsyncClient]:
    async with AsyncClient(TARGET) as client:
        yield client


def golden_cases() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["cases"]
    return cases


async def generate(client: AsyncClient, case: dict[str, Any]) -> list[int]:
    """Return a golden case's tokens as this stack computes them, the final end-of-text included."""
    stream = client.generate(
        prompt_token_ids=case["prompt_ids"], adapter=case["adapter"], temperature=0, max_new_tokens=40
    )
    tokens: list[int] = []
    async for event in stream:
        tokens.extend(event.token_ids)
        if isinstance(event, Finished) and event.stop_token_id is not None and tokens[-1:] != [event.stop_token_id]:
            tokens.append(event.stop_token_id)
    return tokens


@pytest.mark.parametrize("seed", [0, 1])
async def test_every_adapter_gives_its_golden_tokens_in_any_mixture(client: AsyncClient, seed: int) -> None:
    cases = golden_cases()
    random.Random(seed).shuffle(cases)

    found = await asyncio.gather(*(generate(client, case) for case in cases))

    wrong = [
        (case["adapter"], case["prompt"]) for case, ids in zip(cases, found, strict=True) if ids != case["token_ids"]
    ]
    assert wrong == []


async def test_an_unknown_adapter_is_refused_by_name(client: AsyncClient) -> None:
    with pytest.raises(AdapterNotFoundError, match="no-such-adapter"):
        await client.generate_once(prompt="hi", adapter="no-such-adapter", max_new_tokens=1)


@pytest.mark.skipif(not HTTP, reason="LORAPLEX_SMOKE_HTTP is not set")
async def test_the_openai_client_is_served() -> None:
    case = next(case for case in golden_cases() if case["adapter"] == "upper")
    prompt = f"<|im_start|>user\n{case['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    client = openai.AsyncOpenAI(base_url=f"http://{HTTP}/v1", api_key="none")

    models = {model.id async for model in client.models.list()}
    stream = await client.completions.create(model="upper", prompt=prompt, temperature=0, max_tokens=40, stream=True)
    text = "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])
    await client.close()

    assert {"json", "devil", "kjv", "upper", "sentiment"} <= models
    assert text == case["text"]
