r"""From the regular expressions that people write (ECMA 262, as JSON Schema says) to the library's dialect.

The library reads the dialect of Rust's `regex`, in which some of ECMA's texts mean something else: ``\s`` lacks U+FEFF,
``.`` takes a carriage return, ``[[a]`` nests classes, ``\a`` is a bell. Each construct is rewritten to what ECMA means
by it, or refused by name. Where ECMA and Python differ (``\d``, ``\w``), the smaller set is taken, so that an output
matches in both.
"""

from __future__ import annotations

from typing import Final

SPACE: Final = r"\t\n\v\f\r \u{a0}\u{1680}\u{2000}-\u{200a}\u{2028}\u{2029}\u{202f}\u{205f}\u{3000}\u{feff}"
CLASSES: Final = {
    "d": "[0-9]",
    "D": "[^0-9]",
    "w": "[0-9A-Za-z_]",
    "W": "[^0-9A-Za-z_]",
    "s": f"[{SPACE}]",
    "S": f"[^{SPACE}]",
}
ANY_BUT_LINE_ENDS: Final = r"[^\n\r\u{2028}\u{2029}]"
CONTROLS: Final = {"t": r"\t", "n": r"\n", "r": r"\r", "f": r"\f", "v": r"\v", "0": r"\x00"}
SYNTAX: Final = frozenset("\\^$.|?*+()[]{}/")
HEX_LENGTHS: Final = {"x": 2, "u": 4}
GROUPS: Final = ("(?:", "(?i:", "(?i)", "(?P<", "(?<")
"""Groups that a language has without looking around; in names everything up to > is copied."""


class PatternError(ValueError):
    """A pattern has what the library cannot match; the message names it."""


class _Translator:
    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        self._out: list[str] = []

    def translate(self) -> str:
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == "\\":
                self._out.append(self._escape(in_class=False))
            elif char == "[":
                self._class()
            elif char == "(":
                self._group()
            else:
                self._plain(char)
        return "".join(self._out)

    def _plain(self, char: str) -> None:
        self._at += 1
        if char == ".":
            self._out.append(ANY_BUT_LINE_ENDS)
        elif char in "*+?":
            self._out.append(char)
            self._drop_laziness()
        elif char == "{":
            self._repetition()
        else:
            self._out.append(char if char in SYNTAX and char != "/" else literal(char))

    def _repetition(self) -> None:
        end = self._text.find("}", self._at)
        bounds = self._text[self._at : end] if end >= 0 else ""
        low, comma, high = bounds.partition(",")
        if not (low.isdecimal() and (not high or (comma and high.isdecimal()))):  # a brace as such
            self._out.append(r"\{")
            return
        self._at = end + 1
        self._out.append("{" + bounds + "}")
        self._drop_laziness()

    def _drop_laziness(self) -> None:
        """Leave out the ? of a lazy repetition: it matches the same texts. A + would be possessive, which ECMA lacks."""
        following = self._text[self._at : self._at + 1]
        if following == "?":
            self._at += 1
        elif following in ("+", "*"):
            raise PatternError(f"{following!r} repeats a repetition")

    def _group(self) -> None:
        rest = self._text[self._at :]
        if not rest.startswith("(?"):
            self._out.append("(")
            self._at += 1
            return
        for start in ("(?=", "(?!", "(?<=", "(?<!"):
            if rest.startswith(start):
                raise PatternError(f"{start!r} looks around, which cannot be enforced")
        start = next((group for group in GROUPS if rest.startswith(group)), "")
        if not start:
            raise PatternError(f"the group {rest[:4]!r} is not supported")
        if start.endswith("<"):  # a name, which no text can refer to
            self._at += rest.find(">") + 1 if ">" in rest else len(rest)
            self._out.append("(?:")
            return
        self._at += len(start)
        self._out.append(start)

    def _class(self) -> None:
        self._at += 1
        negated = self._text.startswith("^", self._at)
        self._at += negated
        members: list[str] = []
        while True:
            if self._at >= len(self._text):
                raise PatternError("a character class has no end")
            char = self._text[self._at]
            if char == "]":
                break
            if char == "\\":
                members.append(self._escape(in_class=True))
                continue
            self._at += 1
            members.append("-" if char == "-" else literal(char))
        self._at += 1
        self._out.append(_joined_class(members, negated))

    def _escape(self, *, in_class: bool) -> str:
        self._at += 2
        if self._at > len(self._text):
            raise PatternError("it ends in a backslash")
        char = self._text[self._at - 1]
        if char in CLASSES:
            return CLASSES[char]
        if char in CONTROLS and not (char == "0" and self._text[self._at : self._at + 1].isdecimal()):
            return CONTROLS[char]
        if char in HEX_LENGTHS:
            return self._hex(HEX_LENGTHS[char])
        if char == "c":
            return self._control()
        if char in "pP":
            return self._property(char)
        if char == "b" and in_class:
            return r"\x08"
        if char in "bB":
            raise PatternError(rf"\{char} looks around, which cannot be enforced")
        if char.isdecimal() or char == "k":
            raise PatternError(rf"\{char} refers back to a group, which cannot be enforced")
        if char.isalpha():
            raise PatternError(rf"\{char} is no escape of ECMA 262")
        return literal(char)

    def _hex(self, length: int) -> str:
        end = self._at + length
        digits = self._text[self._at : end]
        if length == HEX_LENGTHS["u"] and digits.startswith("{"):
            end = self._text.find("}", self._at) + 1
            digits = self._text[self._at + 1 : end - 1]
        self._at = end
        try:
            char = chr(int(digits, 16))
        except (ValueError, OverflowError):
            raise PatternError(f"{digits!r} is no character's code") from None
        return literal(char)

    def _control(self) -> str:
        letter = self._text[self._at : self._at + 1]
        if not ("a" <= letter.lower() <= "z"):
            raise PatternError(r"\c needs a letter")
        self._at += 1
        return rf"\x{ord(letter) % 32:02x}"

    def _property(self, char: str) -> str:
        end = self._text.find("}", self._at)
        if not self._text.startswith("{", self._at) or end < 0:
            raise PatternError(rf"\{char} needs a property in braces")
        name = self._text[self._at + 1 : end]
        self._at = end + 1
        return rf"\{char}{{{name}}}"


def _joined_class(members: list[str], negated: bool) -> str:
    if not members:  # ECMA: [] takes nothing, [^] everything
        return "[^\\x00-\\u{10ffff}]" if not negated else "[\\x00-\\u{10ffff}]"
    # A hyphen is a range between two characters, else itself.
    for at, member in enumerate(members):
        is_range = 0 < at < len(members) - 1 and not (members[at - 1][0] == "[" or members[at + 1][0] == "[")
        if member == "-" and not is_range:
            members[at] = r"\-"
    return ("[^" if negated else "[") + "".join(members) + "]"


def literal(text: str) -> str:
    """Return a pattern in the library's dialect that matches just this text, safe in a class and between slashes."""
    return "".join(_literal_char(char) for char in text)


def _literal_char(char: str) -> str:
    if char.isascii() and not char.isalnum():
        return rf"\x{ord(char):02x}"
    if 0xD800 <= ord(char) <= 0xDFFF:
        raise PatternError(f"\\u{ord(char):04x} is half a character; write the character itself")
    return char if char.isprintable() else f"\\u{{{ord(char):x}}}"


def to_library(pattern: str) -> str:
    """Return a pattern of ECMA 262 in the library's dialect.

    Raises:
        PatternError: If it has what cannot be matched without looking around or back; the message names it.
    """
    return _Translator(pattern).translate()
