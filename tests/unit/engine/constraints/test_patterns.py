"""Patterns mean what ECMA 262 says, in whatever dialect the library reads them, or are refused by name."""

from __future__ import annotations

import pytest
from loraplex_common.errors import InvalidParameterError
from loraplex_common.structured_output import ConstraintKind
from support.constraint_rig import compile_here, takes


@pytest.mark.parametrize(
    ("pattern", "taken", "not_taken"),
    [
        ("abc", ["abc"], ["ab", "abcd", "xabc"]),
        ("^abc$", ["abc"], ["xabc"]),
        ("a|b{2,3}", ["a", "bb", "bbb"], ["b", "abb"]),
        (r"\d{3}", ["123"], ["12", "١٢٣"]),
        (r"\w+", ["a_9"], ["é"]),
        (r".", ["a", "é", "/"], ["\n", "\r", "\u2028"]),
        (r"a.*?b", ["ab", "axxb"], ["a"]),
        (r"[[a]", ["[", "a"], ["b"]),
        (r"[a&&b]", ["a", "&", "b"], ["c"]),
        (r"[^\]a-c/-]", ["d", "x"], ["]", "b", "/", "-"]),
        (r"[\w-]", ["-", "z"], ["+"]),
        (r"[+--]", ["+", ",", "-"], ["."]),
        (r"\s", [" ", "\ufeff", "\u00a0"], ["a"]),
        (r"[\s\S]", ["\n", "x"], []),
        (r"[\S]", ["x"], ["\ufeff"]),
        (r"[]", [], ["", "a"]),
        (r"[^]", ["a", "\n"], [""]),
        (r"\x41\u0042\u{43}", ["ABC"], []),
        (r"\cA|\0", ["\x01", "\x00"], []),
        (r"\/\.\-\<\"", ['/.-<"'], []),
        (r"(?:a)(?<name>b)(c)", ["abc"], []),
        (r"(?i:ab)c", ["ABc"], ["ABC"]),
        (r"x{", ["x{"], []),
        (r"x{,3}", ["x{,3}"], ["xx"]),
        (r"\p{Lu}", ["Ä"], ["ä"]),
        (r"[\b]", ["\b"], []),
        (r"#  ~'", ["#  ~'"], []),
    ],
)
def test_a_pattern_takes_what_ecma_says(pattern: str, taken: list[str], not_taken: list[str]) -> None:
    if not taken:
        with pytest.raises(InvalidParameterError, match="regex: no output satisfies it"):
            compile_here(ConstraintKind.REGEX, pattern)
        return
    constraint = compile_here(ConstraintKind.REGEX, pattern)
    assert [text for text in taken if not takes(constraint, text)] == []
    assert [text for text in not_taken if takes(constraint, text)] == []


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("(?=a)b", "'(?=' looks around"),
        ("(?<!a)b", "'(?<!' looks around"),
        (r"a\b", r"\b looks around"),
        (r"(a)\1", r"\1 refers back"),
        (r"(?<n>a)\k<n>", r"\k refers back"),
        (r"\a", r"\a is no escape"),
        (r"\Z", r"\Z is no escape"),
        (r"\c1", r"\c needs a letter"),
        (r"\ud800", "half a character"),
        (r"(?s:.)", "the group '(?s:'"),
        ("a*+", "repeats a repetition"),
        ("[a", "has no end"),
        ("a\\", "ends in a backslash"),
        ("(a", "regex: "),
        ("a{3,2}", "regex: "),
    ],
)
def test_what_cannot_be_matched_is_refused_by_name(pattern: str, named: str) -> None:
    with pytest.raises(InvalidParameterError) as refusal:
        compile_here(ConstraintKind.REGEX, pattern)
    assert named in refusal.value.message
