"""Random strict functions through random adapters and tool formats, over HTTP, on a real gateway and a real engine.

``python -m support.tool_campaign --requests 500`` (``make tool-campaign``) runs any number of requests and writes the
results; the test suite runs some. Calls of whatever ends must be valid for `jsonschema`; those of what was cut must begin
valid ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
from support.adapters import Recipe, write_adapter
from support.base_models import TinyBase, write_base_model
from support.random_calls import MARKERS, TEMPLATES, CallAnswer, CallRequest, faults, make_call_request
from support.stack import Stack, StackFlags, running_stack
from support.stack_fixtures import import_all
from tokenizers import AddedToken, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

NUM_AT_ONCE: Final = 12
REQUEST_TIMEOUT_S: Final = 240.0
RECIPES: Final = (Recipe(rank=4, seed=1), Recipe(rank=16, alpha=8, use_rslora=True, seed=2), Recipe(rank=1, seed=3))
IN_WORDS: Final = "hermes in words"
"""How functions are offered where the template has no place for them."""


@dataclass
class ToolTally:
    """The results of a campaign.

    Attributes:
        seed: Seed of everything random; request n is drawn from ``f"{seed}-{n}"``.
        num_requests: Answers that were checked.
        num_whole: How many of them ended by themselves.
        num_calls: Calls of those.
        num_cut: How many were cut at their length.
        by_kind: Format, choice and temperature -> (requests, how many ended by themselves).
        wrong: Number of a request -> what was wrong with its answer.
    """

    seed: int
    num_requests: int = 0
    num_whole: int = 0
    num_calls: int = 0
    num_cut: int = 0
    seconds: float = 0.0
    by_kind: dict[str, list[int]] = field(default_factory=dict)
    wrong: dict[int, list[str]] = field(default_factory=dict)


class ToolCampaign:
    """Requests to one gateway.

    Args:
        url: Its HTTP port.
        models: Format -> names of models that write calls in it.
        token_id: Returns the id of the token that a text is as a whole.
        tally: Gets the results.
    """

    def __init__(
        self,
        url: str,
        models: Mapping[str, Sequence[str]],
        token_id: Callable[[str], int | None],
        tally: ToolTally,
    ) -> None:
        self._url = url
        self._models = models
        self._token_id = token_id
        self._tally = tally

    async def run(self, numbers: Sequence[int]) -> None:
        """Run the requests of these numbers."""
        pending = list(reversed(numbers))
        async with httpx.AsyncClient(base_url=self._url, timeout=REQUEST_TIMEOUT_S) as client:

            async def work() -> None:
                while pending:
                    await self._one(client, pending.pop())

            await asyncio.gather(*(work() for _ in range(min(NUM_AT_ONCE, len(numbers)))))

    async def _one(self, client: httpx.AsyncClient, number: int) -> None:
        request = make_call_request(random.Random(f"{self._tally.seed}-{number}"), self._models, self._token_id)
        try:
            answer = await ask(client, request)
        except (httpx.HTTPError, ValueError) as error:
            self._tally.wrong[number] = [repr(error), json.dumps(request.body)]
            return
        self._count(number, request, answer)

    def _count(self, number: int, request: CallRequest, answer: CallAnswer) -> None:
        tally = self._tally
        tally.num_requests += 1
        tally.num_whole += answer.is_whole
        tally.num_cut += answer.finish_reason == "length"
        tally.num_calls += len(answer.calls) if answer.is_whole else 0
        choice = request.body["tool_choice"]
        fmt = next(fmt for fmt, names in self._models.items() if request.body["model"] in names)
        kinds = (fmt, choice if isinstance(choice, str) else "named", f"temperature {request.body['temperature']}")
        for kind in kinds:
            counts = tally.by_kind.setdefault(kind, [0, 0])
            counts[0] += 1
            counts[1] += answer.is_whole
        if found := faults(request, answer):
            tally.wrong[number] = [*found, json.dumps(request.body)]


async def ask(client: httpx.AsyncClient, request: CallRequest) -> CallAnswer:
    """Send a request and return its answer, streamed or not.

    Raises:
        ValueError: If the answer is an error, or no answer of this API.
    """
    async with client.stream("POST", "/v1/chat/completions", json=request.body) as response:
        if response.status_code != 200:
            raise ValueError(f"{response.status_code}: {(await response.aread()).decode()[:1000]}")
        if request.body["stream"]:
            return await _streamed(response)
        (choice,) = json.loads(await response.aread())["choices"]
        message = choice["message"]
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
        return CallAnswer(message["content"] or "", calls, choice["finish_reason"])


async def _streamed(response: httpx.Response) -> CallAnswer:
    answer = CallAnswer()
    async for line in response.aiter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            raise ValueError(line)
        for choice in chunk["choices"]:
            delta = choice["delta"]
            answer.content += delta.get("content") or ""
            answer.finish_reason = choice["finish_reason"] or answer.finish_reason
            for call in delta.get("tool_calls") or ():
                if call["index"] == len(answer.calls):
                    answer.calls.append((call["function"]["name"], ""))
                name, arguments = answer.calls[call["index"]]
                answer.calls[call["index"]] = (name, arguments + call["function"].get("arguments", ""))
    return answer


async def run_tool_campaign(
    stack: Stack, models: Mapping[str, Sequence[str]], *, numbers: Sequence[int], seed: int
) -> ToolTally:
    """Run requests; raises only if the stack is lost, every other fault is in the tally.

    Args:
        stack: A running stack.
        models: Format -> names of models that write calls in it.
        numbers: Which requests of the seed.
        seed: Seed of everything random.
    """
    tokenizer = Tokenizer.from_file(str(stack.model / "tokenizer.json"))
    tally, began_s = ToolTally(seed), time.monotonic()
    url = f"http://{stack.gateway.addresses['http']}"
    await ToolCampaign(url, models, tokenizer.token_to_id, tally).run(numbers)
    tally.seconds = round(time.monotonic() - began_s, 1)
    return tally


def write_callers(directory: Path, model: Path, recipes: Sequence[Recipe]) -> dict[str, list[str]]:
    """Write adapters that bring the template of each format; return format -> their names."""
    names: dict[str, list[str]] = {}
    for fmt, template in TEMPLATES.items():
        for n, recipe in enumerate(recipes):
            folder = write_adapter(directory / f"calls-{fmt}-{n}", model, recipe)
            (folder / "chat_template.jinja").write_text(template)
            names.setdefault(fmt, []).append(folder.name)
    return names


def write_tool_world(directory: Path, *, has_markers: bool) -> tuple[Path, dict[str, list[str]]]:
    """Write a tiny base model, and adapters of every format under ``adapters``; return the model and format -> models.

    Args:
        directory: Gets both.
        has_markers: Whether the formats' markers are tokens, or are spelt.
    """
    model = write_base_model(directory / "tiny", TinyBase(vocab_size=400, max_position_embeddings=8192))
    if has_markers:
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        tokenizer.add_tokens([AddedToken(text, special=n % 2 == 0, normalized=False) for n, text in enumerate(MARKERS)])
        tokenizer.save(str(model / "tokenizer.json"))
    names = write_callers(directory / "adapters", model, RECIPES)
    write_adapter(directory / "adapters" / "plain", model, RECIPES[0])
    return model, names | {IN_WORDS: [model.name, "plain"]}


def main() -> int:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of single requests")
    parser.add_argument("--seed", type=int, default=None, help="default: from the clock")
    parser.add_argument("--spelt", action="store_true", help="let the formats' markers be text, not tokens")
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="where to write what came of it")
    arguments = parser.parse_args()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model, models = write_tool_world(directory, has_markers=not arguments.spelt)
        (directory / "stack").mkdir()
        flags = StackFlags(engine=("--pool-bytes", "64MiB", "--arena-bytes", "16MiB"))
        with running_stack(directory / "stack", model, directory / "adapters", flags) as stack:
            import_all(stack)
            numbers = arguments.only or range(arguments.requests)
            tally = asyncio.run(run_tool_campaign(stack, models, numbers=numbers, seed=seed))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    text = json.dumps({"commit": commit, "spelt": arguments.spelt, **asdict(tally)}, indent=2)
    print(text)
    if arguments.results is not None:
        (arguments.results / f"tools_{commit[:12]}_{seed}.json").write_text(text + "\n")
    return 1 if tally.wrong or tally.num_whole < 0.8 * tally.num_requests else 0


if __name__ == "__main__":
    sys.exit(main())
