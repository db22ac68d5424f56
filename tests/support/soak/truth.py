"""The right answers: tokens of each revision, prompt and way of sampling, taken from the undisturbed fleet."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loraplex_client import AsyncClient, Started
from support.adapters import Recipe, write_adapter

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from support.soak.fleet import Fleet

MAX_TOKENS: Final = 200
PROMPTS: Final = (tuple(range(5, 12)), tuple(range(40, 60)), tuple(range(100, 170)))
SAMPLINGS: Final[tuple[dict[str, Any], ...]] = ({"temperature": 0.0}, {"temperature": 0.8, "seed": 7})
STABLE: Final = tuple(f"stable{i}" for i in range(5))
MOVING: Final = ("moving0", "moving1")
NUM_VARIANTS: Final = 3
PASSING: Final = tuple(f"passing{i}" for i in range(4))
LABEL: Final = "prod"
AT_ONCE: Final = 24
ANSWER_S: Final = 120.0


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request whose whole answer is known.

    Attributes:
        adapter: Its name as a client writes it; empty for the base model.
        prompt: Index into `PROMPTS`.
        sampling: Index into `SAMPLINGS`.
        num_tokens: Length of the answer.
    """

    adapter: str
    prompt: int
    sampling: int
    num_tokens: int

    def options(self) -> dict[str, Any]:
        """Return the arguments of the Python client."""
        options = {"prompt_token_ids": PROMPTS[self.prompt], "max_new_tokens": self.num_tokens, "ignore_eos": True}
        return options | SAMPLINGS[self.sampling] | ({"adapter": self.adapter} if self.adapter else {})

    def body(self, base: str) -> dict[str, Any]:
        """Return the body of a completion over HTTP."""
        body = {"model": self.adapter or base, "prompt": list(PROMPTS[self.prompt]), "max_tokens": self.num_tokens}
        return body | SAMPLINGS[self.sampling] | {"ignore_eos": True, "stream": True, "return_token_ids": True}


def any_question(rng: random.Random, adapter: str) -> Question:
    """Return a question of random kind and length."""
    return Question(
        adapter=adapter,
        prompt=rng.randrange(len(PROMPTS)),
        sampling=rng.randrange(len(SAMPLINGS)),
        num_tokens=rng.randint(20, MAX_TOKENS),
    )


class Truth:
    """Known answers.

    Attributes:
        revisions: Folder of an adapter -> digest.
    """

    def __init__(self, import_root: Path) -> None:
        self.import_root = import_root
        self.revisions: dict[str, str] = {}
        self._answers: dict[tuple[str, int, int], tuple[int, ...]] = {}

    def folder(self, name: str) -> Path:
        """Return the folder of an adapter's files."""
        return self.import_root / name

    def answer(self, revision: str, question: Question) -> tuple[int, ...] | None:
        """Return the tokens that a revision gives; None if the revision is unknown."""
        known = self._answers.get((revision, question.prompt, question.sampling))
        return None if known is None else known[: question.num_tokens]

    def write(self, model: Path) -> None:
        """Write all adapters."""
        variants = [f"{name}-{variant}" for name in MOVING for variant in range(NUM_VARIANTS)]
        for index, name in enumerate((*STABLE, *variants, *PASSING)):
            write_adapter(self.folder(name), model, Recipe(rank=2 + 3 * (index % 6), seed=index))

    async def learn(self, fleet: Fleet) -> None:
        """Import everything and ask every question."""
        async with AsyncClient(fleet.gateways[0].grpc, store_target=fleet.stores[0].grpc) as client:
            await self._import(client)
            turns = asyncio.Semaphore(AT_ONCE)

            async def ask(adapter: str, revision: str, prompt: int, sampling: int) -> None:
                question = Question(adapter=adapter, prompt=prompt, sampling=sampling, num_tokens=MAX_TOKENS)
                async with turns, asyncio.timeout(ANSWER_S):
                    tokens: list[int] = []
                    async for event in client.generate(**question.options()):
                        tokens += event.token_ids
                        if isinstance(event, Started):
                            assert event.adapter_revision == revision, question
                assert len(tokens) == MAX_TOKENS, question
                self._answers[revision, prompt, sampling] = tuple(tokens)

            known = [(f"{folder.partition('-')[0]}@{digest}", digest) for folder, digest in self.revisions.items()]
            kinds = [(prompt, sampling) for prompt in range(len(PROMPTS)) for sampling in range(len(SAMPLINGS))]
            await asyncio.gather(*(ask(*named, *kind) for named in (("", ""), *known) for kind in kinds))
            for name in PASSING:
                await client.adapters.delete(name, force=True)

    async def _import(self, client: AsyncClient) -> None:
        for folder in sorted(path.name for path in self.import_root.iterdir()):
            label = LABEL if folder.endswith("-0") else ""
            found = await client.adapters.import_directory(folder.partition("-")[0], self.folder(folder), label=label)
            self.revisions[folder] = found.revision.digest
