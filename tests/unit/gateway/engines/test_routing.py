"""Which engine takes a request."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from loraplex_gateway.engines.routing import WARM_LOAD_FACTOR, WARM_LOAD_SLACK, Candidate, choose, rendezvous

DIGEST = "a" * 64


def pick(*candidates: tuple[str, int, bool], affinity_key: str = "") -> str | None:
    made = [
        Candidate(engine_id=engine_id, load=load, missing_bytes=0 if warm else 100)
        for engine_id, load, warm in candidates
    ]
    return choose(made, adapters=DIGEST, affinity_key=affinity_key)


def test_without_candidates_there_is_no_choice() -> None:
    assert pick() is None


def test_the_least_loaded_of_equals_is_taken() -> None:
    assert pick(("a", 3, False), ("b", 1, False), ("c", 2, False)) == "b"


def test_a_warm_engine_goes_before_an_idle_cold_one() -> None:
    assert pick(("cold", 0, False), ("warm", 3, True)) == "warm"


def test_a_warm_engine_much_busier_than_the_idlest_is_passed_over() -> None:
    assert pick(("cold", 10, False), ("warm", 100, True)) == "cold"


def test_equally_loaded_cold_engines_agree_on_a_home_for_the_adapter() -> None:
    engines = [(f"e{n}", 0, False) for n in range(5)]

    assert (
        pick(*engines)
        == pick(*reversed(engines))
        == max((e for e, _, _ in engines), key=lambda e: rendezvous(DIGEST, e))
    )


def test_an_affinity_key_has_a_home_until_that_is_overloaded() -> None:
    engines = [(f"e{n}", 0, False) for n in range(5)]
    home = pick(*engines, affinity_key="user-1")
    assert home is not None

    busy = [(engine_id, 50 if engine_id == home else 0, False) for engine_id, _, _ in engines]

    assert pick(*busy, affinity_key="user-1") != home


@given(keys=st.lists(st.text(min_size=1), min_size=1, max_size=20), gone=st.integers(0, 4))
def test_losing_an_engine_moves_only_its_own_keys(keys: list[str], gone: int) -> None:
    engines = [(f"e{n}", 0, False) for n in range(5)]
    rest = engines[:gone] + engines[gone + 1 :]

    for key in keys:
        before = pick(*engines, affinity_key=key)
        if before != f"e{gone}":
            assert pick(*rest, affinity_key=key) == before


def test_the_engine_that_lacks_the_fewest_bytes_goes_before_idler_ones() -> None:
    engines = [("none", 0, 110), ("small", 1, 100), ("large", 3, 10), ("both", 50, 0)]
    made = [Candidate(engine_id=name, load=load, missing_bytes=missing) for name, load, missing in engines]

    assert choose(made, adapters=DIGEST, affinity_key="") == "large"


@given(st.lists(st.tuples(st.integers(0, 200), st.booleans()), min_size=1, max_size=8))
def test_nobody_waits_behind_a_much_busier_engine(engines: list[tuple[int, bool]]) -> None:
    named = [(f"e{n}", load, warm) for n, (load, warm) in enumerate(engines)]

    chosen = pick(*named)

    load = next(load for engine_id, load, _ in named if engine_id == chosen)
    assert load <= min(load for _, load, _ in named) * WARM_LOAD_FACTOR + WARM_LOAD_SLACK
