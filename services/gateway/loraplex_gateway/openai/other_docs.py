"""Writes the tables of docs/responses.md and docs/messages.md from the fields of their bodies.

`python -m loraplex_gateway.openai.other_docs docs/responses.md` brings a page up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_gateway.openai.field_docs import END, field_table
from loraplex_gateway.openai.fields import CHAT
from loraplex_gateway.openai.messages_api import fields as messages
from loraplex_gateway.openai.responses_api import fields as responses

if TYPE_CHECKING:
    from loraplex_gateway.openai.fields import Table

START: Final = "<!-- tables: written by loraplex_gateway.openai.other_docs -->\n"
PAGES: Final[dict[str, tuple[Table, ...]]] = {
    "responses.md": (
        responses.RESPONSES,
        responses.TEXT,
        responses.FORMAT,
        responses.REASONING,
        responses.STREAM_OPTIONS,
        responses.TOOL,
        responses.MESSAGE,
        responses.FUNCTION_CALL,
        responses.FUNCTION_CALL_OUTPUT,
        responses.REASONING_ITEM,
        responses.PART,
    ),
    "messages.md": (
        messages.MESSAGES,
        messages.COUNT_TOKENS,
        messages.THINKING,
        messages.TOOL_CHOICE,
        messages.OUTPUT_CONFIG,
        messages.FORMAT,
        messages.TOOL,
        messages.MESSAGE,
        messages.TEXT_BLOCK,
        messages.TOOL_USE_BLOCK,
        messages.TOOL_RESULT_BLOCK,
        messages.THINKING_BLOCK,
    ),
}


def with_tables(page: str, text: str) -> str:
    """Return a page with the tables between its two marks brought up to date."""
    before, _, rest = text.partition(START)
    sections = "".join(f"\n### `{table.name}`\n\n{field_table(_own(table))}" for table in PAGES[page])
    return f"{before}{START}{sections}\n{END}{rest.partition(END)[2]}"


def _own(table: Table) -> Table:
    """Return the table without the fields that it takes over from chat completions as they are, but for `model`."""
    own = {n: field for n, field in table.fields.items() if n == "model" or CHAT.fields.get(n) is not field}
    return type(table)(table.name, own, table.nested)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(with_tables(file.name, file.read_text(encoding="utf-8")), encoding="utf-8")
