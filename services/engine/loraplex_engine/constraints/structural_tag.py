"""Structural tags: free text with constrained parts, in both of the forms that vLLM takes.

The older form has `structures` (begin, schema, end) and `triggers`. The newer one has a tree of formats under `format`,
as xgrammar defines them; each format becomes an expression of Lark. A tag whose text begins with one of the model's own
tokens, such as ``<tool_call>``, is asked for as that token; as a trigger it counts in either spelling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from loraplex_engine.constraints.json_text import ConstraintTextError, read_json
from loraplex_engine.constraints.tag_formats import TagGrammar

if TYPE_CHECKING:
    from loraplex_engine.constraints.tokenizer import Vocabulary

_OLD_FIELDS: Final = {"type", "structures", "triggers"}


def read_structural_tag(text: str, vocabulary: Vocabulary, *, compact: bool = False) -> list[dict[str, Any]]:
    """Return the library's grammars of a structural tag.

    Args:
        text: The JSON of the tag.
        vocabulary: The model's tokens.
        compact: Whether JSON within it has no blanks.

    Raises:
        ConstraintTextError: If it has no such form, or a format that cannot be enforced; the message names it.
    """
    tag = read_json(text)
    if not isinstance(tag, dict) or tag.get("type", "structural_tag") != "structural_tag":
        raise ConstraintTextError('an object is needed, with "type": "structural_tag"')
    if "format" in tag:
        return TagGrammar(vocabulary, compact=compact).finish(tag["format"])
    if unknown := set(tag) - _OLD_FIELDS:
        raise ConstraintTextError(
            f"the field {min(unknown)!r} is not known; a tag has format, or structures and triggers"
        )
    return TagGrammar(vocabulary, compact=compact).finish(_from_structures(tag))


def _from_structures(tag: dict[str, Any]) -> dict[str, Any]:
    """Return the older form as a format of the newer one."""
    structures, triggers = tag.get("structures"), tag.get("triggers")
    if not isinstance(structures, list) or not structures or not all(isinstance(item, dict) for item in structures):
        raise ConstraintTextError("'structures' must have a list of objects, at least one")
    tags = []
    for structure in structures:
        if missing := {"begin", "end", "schema"} - set(structure):
            raise ConstraintTextError(f"a structure lacks {min(missing)!r}")
        content = {"type": "json_schema", "json_schema": structure["schema"]}
        tags.append({"type": "tag", "begin": structure["begin"], "content": content, "end": structure["end"]})
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}
