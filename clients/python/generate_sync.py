"""Generate the blocking client from the asyncio one.

``python clients/python/generate_sync.py`` writes ``loraplex_client/_sync`` from ``loraplex_client/_aio``; ``--check`` fails
if it is out of date. Where the two wait in different ways, both have a function of one name in their own ``waiting.py``.

Token by token, as psycopg and httpcore make theirs: ``async`` and ``await`` go, names lose what says asyncio, and the few
phrases of docstrings and comments below are exchanged. Ruff then sorts the imports and lays out the lines.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PACKAGE: Final = Path(__file__).resolve().parent / "loraplex_client"
SOURCE, TARGET = PACKAGE / "_aio", PACKAGE / "_sync"
WRITTEN_BY_HAND: Final = frozenset({"__init__.py", "waiting.py"})

NAMES: Final = {"_aio": "_sync", "aclose": "close", "open_aio": "open"}
PHRASES: Final = {
    ", for asyncio.": ", blocking.",
    "The asyncio client": "The blocking client",
    "of the asyncio client": "of the blocking client",
    "asyncio, on one event loop": "blocking, safe to share between threads",
    "the end of an\n    ``async with`` block": "the end of a\n    ``with`` block",
    "async for": "for",
    "``aclose``": "``close``",
    "dropping it, or cancelling the task that reads it": "or dropping it",
    "by another task": "by another thread",
}
"""In docstrings and comments; each is met at least once."""

_DUNDER: Final = re.compile(r"__a(next|enter|exit|iter)__")
_LEFT_OVER: Final = re.compile(r"\b(asyncio|aio|async|await)\b")

Edit = tuple[int, int, str]
"""What stands at ``[start, end)`` of a source, in characters, and what takes its place."""


def to_sync(source: str, met: set[str]) -> str:
    """Return the blocking form of a module, not laid out yet.

    Args:
        source: The asyncio form.
        met: The phrases met are added.

    Raises:
        ValueError: If something of asyncio is left.
    """
    for start, end, text in sorted(_edits(source, met), reverse=True):
        source = source[:start] + text + source[end:]
    if left := _LEFT_OVER.search(source):
        line = source.count("\n", 0, left.start()) + 1
        raise ValueError(f"{left[0]!r} is left in line {line}: {source.splitlines()[line - 1].strip()!r}")
    return source


def _edits(source: str, met: set[str]) -> Iterator[Edit]:
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    line_starts = [0]
    for line in source.splitlines(keepends=True):
        line_starts.append(line_starts[-1] + len(line))

    def place(position: tuple[int, int]) -> int:
        return line_starts[position[0] - 1] + position[1]

    for index, token in enumerate(tokens):
        start, end = place(token.start), place(token.end)
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            yield start, end, _exchange(token.string, met)
        elif token.type != tokenize.NAME:
            continue
        elif token.string in ("async", "await"):
            yield start, place(tokens[index + 1].start), ""
        elif token.string == "aio" and tokens[index - 1].string == ".":  # grpc.aio.Channel
            yield place(tokens[index - 1].start), end, ""
        elif token.string == "Awaitable" and tokens[index + 1].string == "[":  # Awaitable[T]
            closing = _closing(tokens, index + 1)
            yield start, place(tokens[index + 1].end), ""
            yield place(closing.start), place(closing.end), ""
        else:
            yield start, end, _name(token.string)


def _name(name: str) -> str:
    return NAMES.get(name) or _DUNDER.sub(r"__\1__", name.replace("Async", ""))


def _exchange(text: str, met: set[str]) -> str:
    for phrase, other in PHRASES.items():
        if phrase in text:
            met.add(phrase)
            text = text.replace(phrase, other)
    return re.sub(r"\w*Async\w+", lambda found: _name(found[0]), text)


def _closing(tokens: list[tokenize.TokenInfo], opening: int) -> tokenize.TokenInfo:
    depth = 0
    for token in tokens[opening:]:
        depth += (token.string == "[") - (token.string == "]")
        if depth == 0:
            return token
    raise ValueError("a bracket is not closed")


def _laid_out(text: str, path: Path) -> str:
    """Return a module with its imports sorted, unused ones gone, and its lines laid out."""
    for command in (("check", "--quiet", "--fix-only", "--select=F401,I"), ("format", "--quiet")):
        arguments = (sys.executable, "-m", "ruff", *command, f"--stdin-filename={path}", "-")
        text = subprocess.run(arguments, input=text, capture_output=True, text=True, check=True).stdout
    return text


def generate(names: Iterable[str]) -> dict[str, str]:
    """Return the blocking modules by file name.

    Raises:
        ValueError: If one cannot be made, or a phrase stands nowhere.
    """
    made, met = {}, set[str]()
    for name in names:
        try:
            text = to_sync((SOURCE / name).read_text(), met)
        except ValueError as error:
            raise ValueError(f"{SOURCE / name}: {error}") from error
        note = f"# Generated by clients/python/generate_sync.py from _aio/{name}; do not edit.\n"
        made[name] = _laid_out(note + text, TARGET / name)
    if unmet := PHRASES.keys() - met:
        raise ValueError(f"phrases that stand nowhere: {', '.join(sorted(unmet))}")
    return made


def _stale(made: dict[str, str]) -> list[str]:
    """Return the files of the target that differ from what was made, are missing, or have no source."""
    there = {path.name for path in TARGET.glob("*.py")} - WRITTEN_BY_HAND
    differing = {name for name in there & made.keys() if (TARGET / name).read_text() != made[name]}
    return sorted(differing | (there ^ made.keys()))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="fail if the blocking client is out of date; write nothing"
    )
    is_check = parser.parse_args().check
    try:
        made = generate(sorted({path.name for path in SOURCE.glob("*.py")} - WRITTEN_BY_HAND))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    stale = _stale(made)
    if is_check and stale:
        raise SystemExit(
            f"the blocking client is out of date: {', '.join(stale)}. Run `make client` and commit the result."
        )
    for name in stale:
        if name in made:
            (TARGET / name).write_text(made[name])
        else:
            (TARGET / name).unlink()


if __name__ == "__main__":
    main()
