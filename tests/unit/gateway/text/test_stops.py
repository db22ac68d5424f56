"""Stop strings: found wherever the text is cut, and nothing of them is let out before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from loraplex_gateway.text.stops import StopMatcher

ALPHABET = st.text("ab<|", min_size=1, max_size=4)


def run(pieces: list[str], stops: list[str], *, include_stop: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include_stop=include_stop)
    out = ""
    for piece in pieces:
        result = matcher.push(piece)
        out += result.text
        if result.matched is not None:
            return out, result.matched
    return out + matcher.flush(), None


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """The oracle: the first character at which some stop string is complete, and the longest one there."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return end, max(complete, key=len)
    return None


@given(pieces=st.lists(st.text("ab<|", max_size=5), max_size=12), stops=st.lists(ALPHABET, max_size=4))
def test_the_cut_does_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    found = first_stop(text, stops)

    assert run(pieces, stops) == ((text, None) if found is None else (text[: found[0] - len(found[1])], found[1]))
    assert run(pieces, stops, include_stop=True) == ((text, None) if found is None else (text[: found[0]], found[1]))


@given(pieces=st.lists(st.text("ab<|", max_size=5), max_size=12), stops=st.lists(ALPHABET, min_size=1, max_size=4))
def test_what_may_become_a_stop_string_is_held(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    for piece in pieces:
        if matcher.push(piece).matched is not None:
            return
        assert any(stop.startswith(matcher.held) for stop in stops)
        assert not any(matcher.held == stop for stop in stops)


def test_text_goes_out_as_soon_as_it_cannot_be_a_stop_string() -> None:
    matcher = StopMatcher(["</s>"])

    assert matcher.push("a<").text == "a"
    assert matcher.push("/").text == ""
    assert matcher.push("p>").text == "</p>"


def test_without_stop_strings_everything_passes() -> None:
    assert run(["a", "", "b"], []) == ("ab", None)
