"""Writes the tables of docs/openai.md from `fields`.

`python -m loraplex_gateway.openai.field_docs docs/openai.md` brings the file up to date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_gateway.openai import fields, further_fields
from loraplex_gateway.openai.fields import Rule
from loraplex_gateway.openai.output_fields import RESPONSE_FORMAT, STRUCTURED_OUTPUTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from loraplex_gateway.openai.fields import Field, Table

START: Final = "<!-- tables: written by loraplex_gateway.openai.field_docs -->\n"
END: Final = "<!-- end of tables -->\n"
# Endpoints that have nothing in common with the two that generate.
OTHERS: Final = (
    further_fields.MODEL_LIST,
    further_fields.TOKENIZE,
    further_fields.DETOKENIZE,
    further_fields.LOAD_ADAPTER,
    further_fields.UNLOAD_ADAPTER,
)


def with_tables(page: str) -> str:
    """Return a page with the tables between its two marks brought up to date."""
    before, _, rest = page.partition(START)
    return f"{before}{START}{tables()}{END}{rest.partition(END)[2]}"


def tables() -> str:
    """Return all tables as Markdown."""
    common = [name for name in fields.COMPLETION.fields if name in fields.CHAT.fields]
    shared = [fields.CHAT.fields[name] for name in common if fields.CHAT.fields[name] == fields.COMPLETION.fields[name]]
    sections = [
        ("Both endpoints", shared),
        *((f"Only `{table.name}`", _others(table, shared)) for table in (fields.COMPLETION, fields.CHAT)),
        *((f"`{table.name}`", list(table.fields.values())) for table in (*_nested(), *OTHERS)),
    ]
    return "".join(f"\n### {title}\n\n{_table(rows)}" for title, rows in sections) + "\n"


def _nested() -> Iterator[Table]:
    messages, calls = fields.CHAT.nested["messages"], fields.TURN_TOOL_CALL
    yield from (messages, messages.nested["content"], calls, calls.nested["function"])
    yield from (fields.TOOL, fields.OFFERED_FUNCTION, fields.ADAPTER, fields.STREAM_OPTIONS)
    yield from (RESPONSE_FORMAT, RESPONSE_FORMAT.nested["json_schema"], STRUCTURED_OUTPUTS)


def _others(table: Table, shared: list[Field]) -> list[Field]:
    return [field for field in table.fields.values() if field not in shared]


def field_table(table: Table) -> str:
    """Return one table as Markdown."""
    return _table(table.fields.values())


def _table(rows: Iterable[Field]) -> str:
    lines = ["| field | rule | |", "| --- | --- | --- |"]
    grouped: dict[tuple[str, str], list[str]] = {}
    for field in rows:
        grouped.setdefault((_rule(field), field.note), []).append(f"`{field.name}`")
    lines += [f"| {', '.join(names)} | {rule} | {_cell(note)} |" for (rule, note), names in grouped.items()]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Return a text as a cell of a table, whose columns a bar would end."""
    return text.replace("|", "\\|")


def _rule(field: Field) -> str:
    if field.rule is not Rule.REFUSED:
        return str(field.rule.value)
    harmless = [f"`{json.dumps(value)}`" for value in field.harmless]
    if field.same_as:
        harmless.append(f"the value of `{field.same_as}`")
    return f"refused, but for {', '.join(harmless)}" if harmless else "refused"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(with_tables(file.read_text(encoding="utf-8")), encoding="utf-8")
