"""What a soak is for: it must notice whatever is not as it should be."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import pytest
from support.soak.book import Book, Outcome
from support.soak.catalogue import LAG_S, Catalogue, Change
from support.soak.expectations import is_expected_of_generation, is_expected_of_the_catalogue
from support.soak.fleet import Part, Role
from support.soak.memory import WARM_UP_S, Life
from support.soak.report import Report, fill
from support.soak.truth import MOVING, NUM_VARIANTS, STABLE, Truth

if TYPE_CHECKING:
    from pathlib import Path

    from support.soak.book import Stream

NAME = f"{MOVING[0]}:prod"


def part() -> Part:
    return Part("gateway0", Role.GATEWAY, spawn=lambda _: pytest.fail("nothing is started here"))


def filled(book: Book) -> Report:
    return fill(Report(seed=1, commit="", minutes=1.0), book, [])


def ended(book: Book, outcome: Outcome) -> None:
    book.close(book.open("grpc", part()), outcome)


def test_undisturbed_answers_are_good() -> None:
    book = Book()
    ended(book, Outcome.OK)

    assert filled(book).verdict() == []


@pytest.mark.parametrize("outcome", [Outcome.WRONG, Outcome.LOST, Outcome.HUNG])
def test_one_stream_that_ends_badly_is_a_bad_soak(outcome: Outcome) -> None:
    book = Book()
    ended(book, Outcome.OK)
    ended(book, outcome)

    assert filled(book).verdict() == [f"1 {outcome.value}"]


def test_a_refusal_is_expected_only_beside_its_cause() -> None:
    assert is_expected_of_generation("STORE_UNAVAILABLE", {"stop store"})
    assert not is_expected_of_generation("STORE_UNAVAILABLE", {"kill engine", "cut streams"})
    assert not is_expected_of_generation("INTERNAL", {"kill engine", "kill gateway", "kill store", "kill valkey"})
    assert is_expected_of_the_catalogue("SATURATED", {"fill valkey"})
    assert not is_expected_of_the_catalogue("SATURATED", set())


def test_a_fault_counts_the_streams_that_were_alive_and_their_longest_gap() -> None:
    book = Book()
    stream = book.open("grpc", part())
    fault = book.begin("kill engine", "engine0")
    stream.heard_s -= 2.5
    book.close(stream, Outcome.OK)
    fault.recovered_s = time.monotonic()
    late = book.open("grpc", part())
    book.close(late, Outcome.LOST)

    figures = filled(book).faults["kill engine"]

    assert (figures["times"], figures["streams_in_flight"], figures["lost"]) == (1, 1, 0)
    assert figures["longest_gap_s"] == pytest.approx(2.5, abs=0.3)


@pytest.mark.parametrize(
    ("mib_per_min", "descriptors_per_min", "is_flat"), [(0.1, 0, True), (0.8, 0, False), (0, 3, False)]
)
def test_a_leak_over_a_long_life_is_noticed(mib_per_min: float, descriptors_per_min: float, is_flat: bool) -> None:
    life = Life("gateway0")
    for second in range(int(WARM_UP_S) + 1200):
        noise = (second % 7) / 7
        life.samples.append(
            (second, 80 + noise + mib_per_min * second / 60, round(20 + descriptors_per_min * second / 60))
        )

    slope = life.slope()

    assert slope is not None
    assert slope.is_flat is is_flat


def test_a_short_life_says_nothing() -> None:
    assert Life("gateway0", [(second, 80.0 + 10 * second, 20) for second in range(90)]).slope() is None


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    truth = Truth(tmp_path)
    truth.revisions = {f"{name}-{n}": f"{name}-{n}" for name in MOVING for n in range(NUM_VARIANTS)}
    truth.revisions |= {name: name for name in STABLE}
    nobody: Any = None
    return Catalogue(nobody, truth, Book(), random.Random(1))


def changed(catalogue: Catalogue, variant: int, *, ago_s: float) -> None:
    at = time.monotonic() - ago_s
    catalogue._changes[NAME].append(Change(f"{MOVING[0]}-{variant}", at, at))


def asked(catalogue: Catalogue, revision: str, adapter: str = NAME) -> tuple[int, Stream]:
    stream = catalogue._book.open("grpc", part())
    catalogue.check(adapter, revision, stream)
    return catalogue._book.num_errors, stream


def test_a_moved_label_may_lag_for_a_moment_and_no_longer(catalogue: Catalogue) -> None:
    changed(catalogue, 1, ago_s=LAG_S / 2)
    assert asked(catalogue, f"{MOVING[0]}-1")[0] == 0
    assert asked(catalogue, f"{MOVING[0]}-0")[0] == 0

    changed(catalogue, 2, ago_s=LAG_S * 2)
    catalogue._changes[NAME].sort(key=lambda change: change.acknowledged_s)

    assert catalogue.longest_lag_s > 0
    assert asked(catalogue, f"{MOVING[0]}-0")[0] == 1, "it has not been that for twice the time"


def test_a_revision_that_a_name_never_had_is_noticed(catalogue: Catalogue) -> None:
    assert asked(catalogue, f"{MOVING[0]}-2")[0] == 1
    assert asked(catalogue, f"{STABLE[1]}", STABLE[0])[0] == 2


def test_a_name_that_is_there_may_not_be_missing(catalogue: Catalogue) -> None:
    _, stream = asked(catalogue, f"{MOVING[0]}-0")

    assert not catalogue.may_be_missing(STABLE[0], stream)
