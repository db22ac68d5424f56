"""The fields that /v1/responses and /v1/messages take over from /v1/chat/completions, with the same meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_gateway.openai.field_rules import Table, table
from loraplex_gateway.openai.fields import ADAPTER, CHAT, COMPLETION

if TYPE_CHECKING:
    from loraplex_gateway.openai.field_rules import Field

ALSO_TAKEN = ("chat_template_kwargs",)


def table_with_inherited(name: str, *own: Field, **nested: Table) -> Table:
    """Return the table of a body: its own fields, then those that both kinds of completion share and it does not have."""
    named = {field.name for field in own}
    taken = [
        field
        for field in CHAT.fields.values()
        if field.name not in named and (field.name in COMPLETION.fields or field.name in ALSO_TAKEN)
    ]
    return table(name, *own, *taken, adapters=ADAPTER, **nested)
