"""Conversations: every turn's prompt begins with all that was said before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loraplex_client.workload.popularity import zipf_adapters
from loraplex_client.workload.trace import NO_ADAPTER, Trace


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationShape:
    """Multi-turn traffic.

    Attributes:
        num_conversations: Each has its own tenant and keeps one adapter.
        rate: Conversations begun per second (Poisson).
        num_adapters: Drawn by Zipf's law with ``zipf_exponent``; 0 for the base model.
        max_turns: Turns are geometric with mean ``mean_turns``, cut off here.
        system_tokens: Leading tokens of the first prompt.
        user_range: Half-open range of what the user adds each turn; ``output_range`` of the answers.
        think_s: Mean of the exponential pause after an answer.
        token_s: Assumed pace of an answer. An open-loop trace cannot know it; a load test sends a turn no earlier than the
            real end of the turn before.
        max_model_len: A conversation ends before it grows longer.
    """

    num_conversations: int
    rate: float
    num_adapters: int = 0
    zipf_exponent: float = 1.0
    mean_turns: float = 4.0
    max_turns: int = 16
    system_tokens: int = 0
    user_range: tuple[int, int] = (16, 256)
    output_range: tuple[int, int] = (16, 256)
    think_s: float = 10.0
    token_s: float = 0.02
    max_model_len: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_conversations < 1 or self.rate <= 0 or self.mean_turns < 1 or self.max_turns < 1:
            raise ValueError("conversations and turns must be at least one, the rate above 0")
        longest = self.system_tokens + self.user_range[1] + self.output_range[1] - 2
        if min(self.user_range[0], self.output_range[0]) < 1 or longest > self.max_model_len:
            raise ValueError(
                f"a first turn of up to {longest} tokens must fit {self.max_model_len}, of 1 token or more"
            )


def conversations(shape: ConversationShape) -> Trace:
    """Return all turns, in order of arrival; ``prefix_tokens`` is what an ideal prefix cache would save."""
    generator, count = np.random.default_rng(shape.seed), shape.num_conversations
    arrival_s = np.cumsum(generator.exponential(1 / shape.rate, count))
    num_turns = np.minimum(generator.geometric(1 / shape.mean_turns, count), shape.max_turns)
    adapter = np.full(count, NO_ADAPTER, dtype=np.int32)
    if shape.num_adapters:
        adapter = zipf_adapters(shape.num_adapters, count, exponent=shape.zipf_exponent, generator=generator)
    prefix = np.zeros(count, dtype=np.int64)
    alive, turns = np.arange(count), list[dict[str, np.ndarray]]()
    for turn in range(int(num_turns.max())):
        prompt = prefix[alive] + generator.integers(*shape.user_range, len(alive))
        prompt += shape.system_tokens if turn == 0 else 0
        output = generator.integers(*shape.output_range, len(alive))
        fits = (num_turns[alive] > turn) & (prompt + output <= shape.max_model_len)
        alive, prompt, output = alive[fits], prompt[fits], output[fits]
        turns.append(
            {
                "arrival_s": arrival_s[alive],
                "conversation": alive,
                "turn": np.full(len(alive), turn),
                "prompt_tokens": prompt,
                "output_tokens": output,
                "prefix_tokens": prefix[alive],
            }
        )
        prefix[alive] = prompt + output
        arrival_s[alive] += output * shape.token_s + generator.exponential(shape.think_s, len(alive))
    joined = {name: np.concatenate([part[name] for part in turns]) for name in turns[0]}
    who = joined["conversation"]
    return Trace.of(joined.pop("arrival_s"), adapter=adapter[who], tenant=who, **joined)
