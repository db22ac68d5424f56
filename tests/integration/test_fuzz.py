"""A sample of `make fuzz`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.fuzz.__main__ import Fuzzer, FuzzTally, fuzz
from support.fuzz.files import Target
from support.fuzz.mutations import mutated_bytes

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


def test_mutated_files_and_streams_are_refused_and_nothing_breaks() -> None:
    tally = fuzz(seed=7, cases=200, seconds=60.0)

    assert tally["wrong"] == []
    assert tally["num_cases"] >= 200
    assert {"safetensors", "adapter_config", "canonical form", "cache file", "signature", "stream"} <= tally[
        "outcomes"
    ].keys()


def test_what_goes_wrong_is_noted_with_the_input_that_makes_it_again(tmp_path: Path) -> None:
    def read(data: bytes) -> str:
        raise RuntimeError("a bug")

    tally = FuzzTally(seed=7)
    fuzzer = Fuzzer(tally, tmp_path, first=41)

    fuzzer.read(Target("strange files", read, [b"file"], lambda rng, data, corpus: data))

    assert tally.outcomes == {"strange files": {"WRONG": 1}}
    assert tally.wrong[0].startswith("strange files 42: ")
    assert "a bug" in tally.wrong[0]
    assert (tmp_path / "input").read_bytes() == b"file"


def test_an_input_is_made_from_seed_and_number_alone() -> None:
    def inputs(first: int, count: int) -> list[bytes]:
        fuzzer, corpus = Fuzzer(FuzzTally(seed=7), None, first), [b"one file", b"another"]
        rngs = [fuzzer.next("x") for _ in range(count)]
        return [mutated_bytes(rng, rng.choice(corpus), corpus) for rng in rngs]

    assert inputs(0, 20)[10:] == inputs(10, 10)


def test_a_process_that_ends_is_noted() -> None:
    tally = fuzz(seed=7, cases=0, seconds=1.0)

    assert tally["wrong"] == ["the process ended with exit 2 at its start"]
