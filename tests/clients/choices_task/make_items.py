"""Writes items.jsonl: 200 questions with their choices, the same on each run.

`python tests/clients/choices_task/make_items.py > tests/clients/choices_task/items.jsonl`
"""

from __future__ import annotations

import json
import random
from typing import Any, Final

NUM_ITEMS: Final = 200
NOUNS: Final = ("soup", "hotel", "film", "concert", "garden", "lecture", "train ride", "novel", "museum", "new bakery")
GOOD: Final = ("wonderful", "delicious", "brilliant", "a delight", "better than I had hoped", "worth every penny")
BAD: Final = ("dreadful", "a waste of time", "far too noisy", "boring", "worse than I had feared", "overpriced")
CAPITALS: Final = {
    "France": "Paris",
    "Norway": "Oslo",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Greece": "Athens",
    "Russia": "Moscow",
    "Peru": "Lima",
    "Kenya": "Nairobi",
}


def items() -> list[dict[str, Any]]:
    """Return (query, choices, label) of every item; a choice brings the space in front of it."""
    rng = random.Random(20)
    makers = (_review, _sum, _capital)
    return [makers[n % len(makers)](rng) for n in range(NUM_ITEMS)]


def _review(rng: random.Random) -> dict[str, Any]:
    is_good = rng.random() < 0.5
    text = f"The {rng.choice(NOUNS)} was {rng.choice(GOOD if is_good else BAD)}."
    return {
        "query": f"Review: {text}\nSentiment:",
        "choices": [" negative", " positive", " rather mixed"],
        "label": int(is_good),
    }


def _sum(rng: random.Random) -> dict[str, Any]:
    a, b = rng.randrange(2, 30), rng.randrange(2, 30)
    wrong = rng.sample([n for n in range(a + b - 6, a + b + 7) if n != a + b], 2)
    return _shuffled(rng, f"{a} plus {b} equals", f" {a + b}", [f" {n}" for n in wrong])


def _capital(rng: random.Random) -> dict[str, Any]:
    country = rng.choice(list(CAPITALS))
    wrong = rng.sample([city for city in CAPITALS.values() if city != CAPITALS[country]], 2)
    return _shuffled(rng, f"The capital of {country} is", f" {CAPITALS[country]}.", [f" {city}." for city in wrong])


def _shuffled(rng: random.Random, query: str, right: str, wrong: list[str]) -> dict[str, Any]:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"query": query, "choices": choices, "label": choices.index(right)}


if __name__ == "__main__":
    for item in items():
        print(json.dumps(item))
