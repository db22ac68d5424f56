"""Which gateway is asked, and which failures another one may mend."""

from __future__ import annotations

import grpc
import pytest
from loraplex_client._gateways import DOWN_S, Gateways, can_help_elsewhere, split_targets
from loraplex_client._resume import is_interruption
from loraplex_common.errors import (
    AdapterLoadingError,
    CancelledRequestError,
    DrainingError,
    LoraplexError,
    NoEngineError,
    RemoteError,
    SaturatedError,
    StreamInterruptedError,
)


@pytest.mark.parametrize(
    ("code", "is_cut"),
    [("UNAVAILABLE", True), ("UNKNOWN", True), ("INTERNAL", True), ("ABORTED", False), ("PERMISSION_DENIED", False)],
)
def test_statuses_without_a_reason_of_ours_are_cuts_where_they_say_so(code: str, is_cut: bool) -> None:
    bare = RemoteError("cut", code=grpc.StatusCode[code], reason=code, http_status=500)
    said = RemoteError("said", code=grpc.StatusCode[code], reason="SOMETHING", http_status=500)

    assert is_interruption(bare) is is_cut
    assert is_interruption(said) is (code == "UNAVAILABLE")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DrainingError("x"), True),
        (NoEngineError("x"), True),
        (AdapterLoadingError("x"), False),
        (SaturatedError("x"), False),
        (RemoteError("x", code=grpc.StatusCode.UNAVAILABLE, reason="UNAVAILABLE", http_status=503), True),
    ],
)
def test_what_may_be_served_elsewhere(error: LoraplexError, expected: bool) -> None:
    assert can_help_elsewhere(error) is expected


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("a:1", ("a:1",)),
        ("a:1, b:2,", ("a:1", "b:2")),
        (["a:1", "b:2,c:3"], ("a:1", "b:2", "c:3")),
        ("ipv4:1.2.3.4:1,5.6.7.8:2", ("ipv4:1.2.3.4:1,5.6.7.8:2",)),
    ],
)
def test_targets_are_given_in_any_way(target: str | list[str], expected: tuple[str, ...]) -> None:
    assert split_targets(target) == expected
    with pytest.raises(ValueError, match="no gateway"):
        split_targets(" ,")


def test_gateways_take_turns_and_one_that_is_down_comes_last_for_a_while() -> None:
    now = [100.0]
    gateways = Gateways(("a", "b", "c"), ("A", "B", "C"), clock=lambda: now[0])
    assert [gateways.pick().target for _ in range(4)] == ["a", "b", "c", "a"]

    down = gateways.pick()
    assert gateways.after(down, DrainingError("going")).target == "c"
    assert "b" not in [gateways.pick().target for _ in range(6)]
    now[0] += DOWN_S + 1
    assert "b" in [gateways.pick().target for _ in range(3)]


def test_a_lone_target_that_says_it_goes_is_reached_another_way_by_later_calls() -> None:
    gateways = Gateways(("proxy",), ("A",), spare="B")
    first, another = gateways.pick(), gateways.pick()
    assert (first.stub, another.stub) == ("A", "A")

    assert gateways.after(first, DrainingError("going")).stub == "B"
    assert gateways.after(another, CancelledRequestError("gone")).stub == "B", "its calls that end later change nothing"
    second = gateways.pick()
    assert (second.target, second.stub) == ("proxy", "B")
    assert gateways.after(second, StreamInterruptedError("no engine")).stub == "B"
    assert gateways.after(second, DrainingError("going")).stub == "A"
