"""Writes expressions, rules and terminals of the library's variant of Lark."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from loraplex_engine.constraints.json_text import ConstraintTextError
from loraplex_engine.constraints.limits import MAX_LITERAL_BYTES
from loraplex_engine.constraints.patterns import PatternError, literal

if TYPE_CHECKING:
    from loraplex_engine.constraints.tokenizer import Vocabulary

EMPTY: Final = '""'
NO_OPTIONS: Final = "%llguidance {}"


class End(NamedTuple):
    """What ends a part of the output: one of some texts, or a token; nothing at all where the output may go on."""

    texts: tuple[str, ...] = ()
    token: int | None = None


NO_END: Final = End()


class GrammarWriter:
    """Collects the rules of one grammar.

    Args:
        vocabulary: The model's tokens.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._special = sorted(vocabulary.special_tokens, key=len, reverse=True)
        self._rules: dict[tuple[str, str], str] = {}  # options and body -> name
        self._sides: list[dict[str, Any]] = []

    def finish(self, expression: str) -> list[dict[str, Any]]:
        """Return the grammar of an expression, and the grammars that it uses."""
        rules = [f"{name}{options}: {body}" for (options, body), name in self._rules.items()]
        text = "\n".join([NO_OPTIONS, f"start: {expression}", *rules])
        return [{"name": "structural_tag", "lark_grammar": text}, *self._sides]

    def text(self, text: str) -> str:
        """Return the expression of a fixed text; the model's own tokens within it are asked for as such."""
        parts, plain, at = [], "", 0
        while at < len(text):
            name = next((name for name in self._special if text.startswith(name, at)), None)
            if name is None:
                plain += text[at]
                at += 1
                continue
            parts += [self._plain(plain), f"<[{self._vocabulary.special_tokens[name]}]>"]
            plain = ""
            at += len(name)
        return " ".join(part for part in [*parts, self._plain(plain)] if part) or EMPTY

    def end(self, end: End) -> str:
        """Return the expression of an end that follows what has an end of its own."""
        if end.token is not None:
            return f"<[{end.token}]>"
        return "(" + " | ".join(map(self.text, end.texts)) + ")" if end.texts else EMPTY

    def free_text(self, excludes: tuple[str, ...], max_chars: int | None) -> str:
        """Return the terminal of any text."""
        body = "/(?s:.*)/" if max_chars is None else f"/(?s:.{{0,{max_chars}}})/"
        if excludes:
            body += f" & ~/(?s:.*)({'|'.join(map(_literal, excludes))})(?s:.*)/"
        return self._rule("TEXT", "", body)

    def until(self, free: str, end: End) -> str:
        """Return the expression of free text up to its end, with that; without an end it goes to the end of the output."""
        if end.token is not None:
            return f"({free} <[{end.token}]>)"
        if not end.texts or "" in end.texts:
            return free
        return "(" + " | ".join(self.found(free, text, text) for text in end.texts) + ")"

    def found(self, free: str, begin: str, trigger: str) -> str:
        """Return the expression of free text up to where a trigger comes, and of the beginning that then must follow.

        A beginning that starts with one of the model's own tokens is found as that token too.
        """
        name = self._rule("until", "[lazy]", f"{free} /{_literal(trigger)}/")
        found = f"{name} {self.text(begin[len(trigger) :])}"
        token = next((name for name in self._special if begin.startswith(name)), None)
        if token is None:
            return f"({found})"
        rest = self.text(begin[len(token) :])
        return f"({found} | {free} <[{self._vocabulary.special_tokens[token]}]> {rest})"

    def token(self, token: int | str) -> int:
        """Return a token's id.

        Raises:
            ConstraintTextError: If the model has no such token.
        """
        if isinstance(token, int):
            if token >= self._vocabulary.num_tokens:
                raise ConstraintTextError(f"the model has no token {token}")
            return token
        if token in self._vocabulary.special_tokens:
            return self._vocabulary.special_tokens[token]
        ids = self._vocabulary.tokenizer.tokenize_str(token)
        if len(ids) != 1:
            raise ConstraintTextError(f"{token!r} is no single token of the model")
        return ids[0]

    def tokens_but(self, excluded: list[int | str]) -> str:
        """Return the expression of one token, neither of the excluded, nor end-of-text, nor padding."""
        ids = {*map(self.token, excluded), *self._vocabulary.eos_token_ids}
        ranges = [str(token_id) for token_id in sorted(ids)]
        if self._vocabulary.num_tokens < self._vocabulary.tokenizer.vocab_size:
            ranges.append(f"{self._vocabulary.num_tokens}-{self._vocabulary.tokenizer.vocab_size - 1}")
        return f"<[^{','.join(ranges)}]>"

    def side_grammar(self, lark: str) -> str:
        """Return the expression of a grammar of its own."""
        name = f"side_{len(self._sides)}"
        self._sides.append({"name": name, "lark_grammar": lark})
        return f"@{name}"

    def _rule(self, stem: str, options: str, body: str) -> str:
        """Return the name of a rule or terminal, which is written once."""
        return self._rules.setdefault((options, body), f"{stem}_{len(self._rules)}")

    @staticmethod
    def _plain(text: str) -> str:
        return f"/{_literal(text)}/" if text else ""


def _literal(text: str) -> str:
    if len(text.encode("utf-8", "surrogatepass")) > MAX_LITERAL_BYTES:
        raise ConstraintTextError(f"a text is longer than {MAX_LITERAL_BYTES} bytes")
    try:
        return literal(text)
    except PatternError as error:
        raise ConstraintTextError(str(error)) from None
