"""The formats of structural tags as expressions of Lark, one method each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from loraplex_engine.constraints.context_free import read_grammar
from loraplex_engine.constraints.json_schema import prepare_schema
from loraplex_engine.constraints.json_text import ConstraintTextError
from loraplex_engine.constraints.patterns import PatternError, to_library
from loraplex_engine.constraints.tag_fields import FIELDS, read_fields
from loraplex_engine.constraints.tag_grammar import NO_END, End, GrammarWriter

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_engine.constraints.tokenizer import Vocabulary

Format = dict[str, Any]

_STYLE: Final = "json"


class TagGrammar:
    """Writes the grammar of one structural tag.

    Args:
        vocabulary: The model's tokens.
        compact: Whether JSON within it has no blanks.
    """

    def __init__(self, vocabulary: Vocabulary, *, compact: bool) -> None:
        self._writer = GrammarWriter(vocabulary)
        self._compact = compact
        self._readers: dict[str, Callable[[Format, End], str]] = {
            "any_text": self._any_text,
            "any_tokens": self._any_tokens,
            "const_string": self._const_string,
            "dispatch": self._dispatch,
            "exclude_token": self._exclude_token,
            "grammar": self._grammar,
            "json_schema": self._json_schema,
            "optional": lambda fields, end: self._repeated(fields, end, "?"),
            "or": self._or,
            "plus": lambda fields, end: self._repeated(fields, end, "+"),
            "regex": self._regex,
            "repeat": self._repeat,
            "sequence": self._sequence,
            "star": lambda fields, end: self._repeated(fields, end, "*"),
            "tag": self._tag,
            "tags_with_separator": self._tags_with_separator,
            "token": lambda fields, end: self._closed(f"<[{self._writer.token(fields['token'])}]>", end),
            "token_dispatch": self._token_dispatch,
            "token_triggered_tags": self._token_triggered_tags,
            "triggered_tags": self._triggered_tags,
        }

    def finish(self, fmt: Any) -> list[dict[str, Any]]:
        """Return the library's grammars of a format.

        Raises:
            ConstraintTextError: If a format cannot be enforced; the message names it.
        """
        return self._writer.finish(self._read(fmt, NO_END))

    def _read(self, fmt: Any, end: End) -> str:
        """Return the expression of a format and of what ends it."""
        fields = read_fields(fmt)
        return self._readers[fmt["type"]](fields, end)

    def _closed(self, expression: str, end: End) -> str:
        return f"({expression} {self._writer.end(end)})"

    def _const_string(self, fields: Format, end: End) -> str:
        return self._closed(self._writer.text(fields["value"]), end)

    def _any_text(self, fields: Format, end: End) -> str:
        free = self._writer.free_text(tuple(fields["excludes"]), fields["max_chars"])
        return self._writer.until(free, end)

    def _any_tokens(self, fields: Format, end: End) -> str:
        free = self._writer.tokens_but(fields["exclude_tokens"])
        most = "*" if fields["max_tokens"] is None else f"{{0,{fields['max_tokens']}}}"
        return self._closed(free + most, end)

    def _exclude_token(self, fields: Format, end: End) -> str:
        return self._closed(self._writer.tokens_but(fields["exclude_tokens"]), end)

    def _json_schema(self, fields: Format, end: End) -> str:
        if fields["style"] != _STYLE:
            raise ConstraintTextError(f"the style {fields['style']!r} of json_schema cannot be enforced, only 'json'")
        if fields["any_order"]:
            raise ConstraintTextError("any_order of json_schema cannot be enforced: properties have the schema's order")
        schema = fields["json_schema"]
        text = schema if isinstance(schema, str) else json.dumps(schema)
        prepared = prepare_schema(text, compact=self._compact)
        if fields["max_whitespace_cnt"] is not None and "whitespace_pattern" in prepared["x-guidance"]:
            most = fields["max_whitespace_cnt"]
            blanks = {"whitespace_pattern": f"[\\x20\\n\\r\\t]{{1,{most}}}"} if most else {"whitespace_flexible": False}
            options = {key: value for key, value in prepared["x-guidance"].items() if key != "whitespace_pattern"}
            prepared["x-guidance"] = options | blanks
        return self._closed(f"%json {json.dumps(prepared)}", end)

    def _grammar(self, fields: Format, end: End) -> str:
        return self._closed(self._writer.side_grammar(read_grammar(fields["grammar"], compact=self._compact)), end)

    def _regex(self, fields: Format, end: End) -> str:
        try:
            return self._closed(f"/{to_library(fields['pattern'])}/", end)
        except PatternError as error:
            raise ConstraintTextError(f"in {fields['pattern'][:80]!r} {error}") from None

    def _or(self, fields: Format, end: End) -> str:
        return "(" + " | ".join(self._read(element, end) for element in fields["elements"]) + ")"

    def _sequence(self, fields: Format, end: End) -> str:
        elements, parts = fields["elements"], []
        position = 0
        while position < len(elements):
            is_last = position == len(elements) - 1
            element = elements[position]
            if is_last or not _is_open(element):
                parts.append(self._read(element, end if is_last else NO_END))
                position += 1
                continue
            following = read_fields(elements[position + 1])
            kind = elements[position + 1]["type"]
            own_end = end if position + 2 == len(elements) else NO_END
            if kind == "const_string":
                parts.append(self._read(element, End((following["value"],))) + self._writer.end(own_end))
            elif kind == "tag" and isinstance(following["begin"], str):
                parts.append(self._read(element, End((following["begin"],))))
                parts.append(self._content(following) + self._writer.end(own_end))
            else:
                raise ConstraintTextError(f"{element['type']} must be followed by const_string or tag, not {kind}")
            position += 2
        return "(" + " ".join(parts) + ")"

    def _repeated(self, fields: Format, end: End, sign: str) -> str:
        if _is_open(fields["content"]):
            raise ConstraintTextError(f"{fields['content']['type']} cannot be repeated: it has no end of its own")
        return self._closed(f"({self._read(fields['content'], NO_END)}){sign}", end)

    def _repeat(self, fields: Format, end: End) -> str:
        most = "" if fields["max"] == -1 else fields["max"]
        return self._repeated(fields, end, f"{{{fields['min']},{most}}}")

    def _tag(self, fields: Format, end: End) -> str:
        return self._closed(f"{self._begin(fields['begin'])} {self._content(fields)}", end)

    def _begin(self, begin: str | Format) -> str:
        if isinstance(begin, str):
            return self._writer.text(begin)
        return f"<[{self._writer.token(read_fields(begin)['token'])}]>"

    def _content(self, tag: Format) -> str:
        """Return the expression of what follows a tag's beginning, to its end."""
        ends = tag["end"]
        if isinstance(ends, dict):
            return self._read(tag["content"], End((), self._writer.token(read_fields(ends)["token"])))
        return self._read(tag["content"], End(tuple([ends] if isinstance(ends, str) else ends)))

    def _tags_with_separator(self, fields: Format, end: End) -> str:
        tag = "(" + " | ".join(self._read(tag, NO_END) for tag in fields["tags"]) + ")"
        more = "" if fields["stop_after_first"] else f" ({self._writer.text(fields['separator'])} {tag})*"
        needed = "" if fields["at_least_one"] else "?"
        return self._closed(f"({tag}{more}){needed}", end)

    def _triggered_tags(self, fields: Format, end: End) -> str:
        free = self._writer.free_text(tuple(fields["excludes"]), None)
        tags = [read_fields(tag, "tag") for tag in fields["tags"]]
        items = [self._triggered(free, tag, fields["triggers"]) for tag in tags]
        first = [f"{self._begin(tag['begin'])} {self._content(tag)}" for tag in tags]
        return self._in_free_text(items, first, fields, self._writer.until(free, end), end)

    def _triggered(self, free: str, tag: Format, triggers: list[str]) -> str:
        begin = tag["begin"]
        if not isinstance(begin, str):
            raise ConstraintTextError(
                "triggered_tags needs tags that begin with text; token_triggered_tags has the others"
            )
        fitting = [trigger for trigger in triggers if begin.startswith(trigger)]
        if len(fitting) != 1:
            raise ConstraintTextError(f"the tag {begin!r} must begin with one of the triggers, but {len(fitting)} fit")
        return f"{self._writer.found(free, begin, fitting[0])} {self._content(tag)}"

    def _in_free_text(self, items: list[str], first: list[str], fields: Format, tail: str, end: End) -> str:
        """Return free text with items in it.

        Args:
            items: Expressions of free text with a tag after it.
            first: The same tags without text before them.
            fields: Says whether a tag must come, and whether the first one is the last.
            tail: Free text to the end of all.
            end: That end.
        """
        item, direct = " | ".join(items), " | ".join(first)
        if fields["stop_after_first"]:
            ending = self._writer.end(end)
            return f"(({direct}) {ending})" if fields["at_least_one"] else f"(({item}) {ending} | {tail})"
        return f"(({direct}) ({item})* {tail})" if fields["at_least_one"] else f"(({item})* {tail})"

    def _dispatch(self, fields: Format, end: End) -> str:
        free = self._writer.free_text(tuple(fields["excludes"]), None)
        items = [
            f"{self._writer.found(free, pattern, pattern)} {self._read(content, NO_END)}"
            for pattern, content in fields["rules"]
        ]
        options = {"stop_after_first": not fields["loop"], "at_least_one": False}
        return self._in_free_text(items, [], options, self._writer.until(free, end), end)

    def _token_triggered_tags(self, fields: Format, end: End) -> str:
        free = self._writer.tokens_but([*fields["exclude_tokens"], *fields["trigger_tokens"]]) + "*"
        tags = [read_fields(tag, "tag") for tag in fields["tags"]]
        if any(isinstance(tag["begin"], str) for tag in tags):
            raise ConstraintTextError("token_triggered_tags needs tags that begin with a token")
        first = [f"{self._begin(tag['begin'])} {self._content(tag)}" for tag in tags]
        items = [f"{free} {tag}" for tag in first]
        return self._in_free_text(items, first, fields, f"({free} {self._writer.end(end)})", end)

    def _token_dispatch(self, fields: Format, end: End) -> str:
        patterns = [pattern for pattern, _ in fields["rules"]]
        free = self._writer.tokens_but([*fields["exclude_tokens"], *patterns]) + "*"
        items = [
            f"{free} <[{self._writer.token(pattern)}]> {self._read(content, NO_END)}"
            for pattern, content in fields["rules"]
        ]
        options = {"stop_after_first": not fields["loop"], "at_least_one": False}
        return self._in_free_text(items, [], options, f"({free} {self._writer.end(end)})", end)


def _is_open(fmt: Any) -> bool:
    """Return whether a format may go on as long as the model likes, so that what follows must say where it ends."""
    kind = fmt.get("type") if isinstance(fmt, dict) else None
    if kind == "or":
        return any(_is_open(element) for element in fmt.get("elements", ()))
    if kind == "sequence":
        return any(_is_open(element) for element in fmt.get("elements", [])[-1:])
    return kind in FIELDS and kind in ("any_text", "dispatch", "triggered_tags")
