"""Compares chat templates as programs: how a template is spelt makes no difference, what it renders does.

The templates are untrusted and are never run here. Two templates are alike if Jinja parses both to the same tree, in
which line ends, comments, quotes and whitespace control make no difference, nor does ``m.role`` for ``m['role']``. ``{% generation %}`` marks the assistant's
words for a trainer and renders nothing of its own, so the marks are left out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from loraplex_common.chat_sandbox import GenerationTag
from loraplex_common.errors import AdapterCorruptUploadError

from loraplex_adapter_store.checkpoint.bounds import MAX_TEMPLATE_CHARS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DEFAULT_NAME: Final = "default"


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template, as far as it matters for comparisons.

    Attributes:
        program: Its tree, comparable.
        variables: Names that it reads, e.g. ``bos_token``, including names that it assigns itself.
    """

    program: Any
    variables: frozenset[str]


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])


def read_template(source: str, *, file: str) -> Template:
    """Read a chat template.

    Args:
        source: Jinja.
        file: Name of its file, for messages.

    Raises:
        AdapterCorruptUploadError: If it is too long or not Jinja.
    """
    if len(source) > MAX_TEMPLATE_CHARS:
        raise AdapterCorruptUploadError(
            f"{file}: a chat template of {len(source)} characters, at most {MAX_TEMPLATE_CHARS} are read"
        )
    try:
        tree = _environment().parse(source)
        # meta.find_undeclared_variables is not used: it compiles, and the compiler computes constants, such as 'x' *
        # 10**10.
        names = frozenset(node.name for node in tree.find_all(nodes.Name) if node.ctx == "load")
        return Template(_program(tree), names)
    except (jinja2.TemplateError, ValueError) as error:  # ValueError: a number of more digits than Python reads
        raise AdapterCorruptUploadError(f"{file}: its chat template is no Jinja: {str(error)[:200]}") from error
    except RecursionError as error:
        raise AdapterCorruptUploadError(f"{file}: its chat template is nested too deeply") from error


def default_template(value: Any) -> str | None:
    """Return the template that is used when none is named.

    Args:
        value: ``chat_template`` of a configuration: a text, a list of ``{"name", "template"}``, or name -> template.
    """
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    if isinstance(value, dict):
        value = value.get(DEFAULT_NAME)
    return value if isinstance(value, str) else None


def effective_template(jinja: bytes | None, configs: Mapping[str, dict[str, Any]]) -> tuple[str, str] | None:
    """Return the template that a folder's files contain, and the name of its file; None if they contain none.

    Args:
        jinja: Content of chat_template.jinja, which has precedence over the others.
        configs: tokenizer_config.json and chat_template.json, parsed, in the order of precedence.
    """
    if jinja is not None:
        return jinja.decode(errors="replace"), "chat_template.jinja"
    for file, fields in configs.items():
        if (text := default_template(fields.get("chat_template"))) is not None:
            return text, file
    return None


_METHODS: Final = frozenset({*dir(dict), *dir(list), *dir(str)})


def _program(value: Any) -> Any:
    if isinstance(value, nodes.Getattr) and value.attr not in _METHODS:
        # `m.role` is `m['role']`: Jinja tries both for either, and what is in a conversation has no such attribute.
        value = nodes.Getitem(value.node, nodes.Const(value.attr), value.ctx)
    if isinstance(value, nodes.Node):
        children = [(name, _program(child)) for name, child in value.iter_fields()]
        return (type(value).__name__, *children)
    if isinstance(value, list):
        return _statements(value) if any(isinstance(item, nodes.Output) for item in value) else [*map(_program, value)]
    return (type(value).__name__, value)  # 1, 1.0 and true are equal in Python but render differently


def _statements(body: Iterable[Any]) -> list[Any]:
    """Return a block's statements, neighbouring outputs joined: the place of a cut in a text makes no difference."""
    result: list[Any] = []
    for statement in body:
        if not isinstance(statement, nodes.Output):
            result.append(_program(statement))
            continue
        if not (result and result[-1][0] == "Output"):
            result.append(("Output", []))
        for part in statement.nodes:
            for piece in _pieces(part):
                _append(result[-1][1], piece)
    return [statement for statement in result if statement != ("Output", [])]


def _pieces(part: nodes.Expr) -> list[nodes.Expr]:
    """Return the pieces that an output writes in order: ``{{ 'a' + b }}`` is ``a{{ b }}``, as adding joins texts."""
    if isinstance(part, nodes.Concat):
        return [piece for node in part.nodes for piece in _pieces(node)]
    if isinstance(part, nodes.Add):
        pieces = [*_pieces(part.left), *_pieces(part.right)]
        if any(_text(piece) is not None for piece in pieces):
            return pieces
    return [part]


def _text(part: nodes.Node) -> str | None:
    if isinstance(part, nodes.TemplateData):
        return part.data
    return part.value if isinstance(part, nodes.Const) and isinstance(part.value, str) else None


def _append(parts: list[Any], part: nodes.Node) -> None:
    text = _text(part)
    if text is None:
        parts.append(_program(part))
        return
    if parts and parts[-1][0] == "text":
        text = parts.pop()[1] + text
    if text:
        parts.append(("text", text))
