"""What a checkpoint's ``quantization_config`` says, once a file beside this one has read it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.config_values import ConfigValues

SERVE_INSTEAD: Final = "serve the model that was quantised, or a checkpoint in a form that is served"
"""The remedy for what is stored in another way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredForm:
    """How the weight of a linear layer lies in the files.

    Attributes:
        name: Which of the engine's readers unpacks it: a key of its table of stored forms.
        bits: Bits of a number.
        block: Outputs and inputs that share a scale; None in either place is all of them. With ``is_reordered`` inputs
            belong to groups as an index in the files says.
        has_zero_points: Whether zero is stored for each scale; where it is not, the form says where zero lies.
        is_reordered: Whether an index tensor has to say which group an input belongs to.
        scales: Names that the tensor of scales may have.
        zero_offset: What is added to a stored zero.
    """

    name: str
    bits: int
    block: tuple[int | None, int | None] = (None, None)
    has_zero_points: bool = False
    is_reordered: bool = False
    scales: tuple[str, ...] = ("weight_scale",)
    zero_offset: int = 0


@dataclass(frozen=True, slots=True)
class Patterns:
    """Modules by name: ``re:`` and a regular expression, or a name.

    Attributes:
        patterns: As in config.json.
        parts_match: Whether a name also stands for what lies inside it and for every module whose name ends in it, and may
            be a regular expression itself, as transformers has it.
    """

    patterns: tuple[str, ...]
    parts_match: bool = False

    @classmethod
    def read(cls, values: ConfigValues, key: str, *, parts_match: bool = False) -> Patterns:
        """Read a list of patterns.

        Raises:
            BaseModelError: If it is no list of strings, or a regular expression is none.
        """
        found = cls(tuple(values.texts(key) or ()), parts_match)
        try:
            found.matches("")
        except re.error as error:
            raise values.wrong(key, f"expected regular expressions ({error})") from error
        return found

    def matches(self, module: str) -> bool:
        """Tell whether one of the patterns means the module."""
        return any(self._matches(pattern, module) for pattern in self.patterns)

    def _matches(self, pattern: str, module: str) -> bool:
        if pattern.startswith("re:"):
            return re.match(pattern.removeprefix("re:"), module) is not None
        if not self.parts_match:
            return pattern == module
        inside = re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) is not None
        return inside or module == pattern or module.endswith(f".{pattern}")


ALL_LINEAR: Final = "Linear"
"""The target that means every linear layer."""


@dataclass(frozen=True, slots=True)
class Group:
    """Modules that are stored alike."""

    targets: Patterns
    form: StoredForm


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a checkpoint stores its weights.

    Attributes:
        method: ``quant_method`` of config.json.
        groups: A module belongs to the first that names it, else to the first that names all linear layers.
        ignored: Modules that are stored whole.
        quantises_activations: Whether the checkpoint is meant for products of quantised activations, too.
    """

    method: str
    groups: tuple[Group, ...]
    ignored: Patterns = Patterns(())
    quantises_activations: bool = False

    def form_of(self, module: str) -> StoredForm | None:
        """Return how the weight of a linear layer is stored; None if it is whole."""
        if self.ignored.matches(module):
            return None
        named = [group.form for group in self.groups if group.targets.matches(module)]
        named += [group.form for group in self.groups if ALL_LINEAR in group.targets.patterns]
        return named[0] if named else None


def every_linear(form: StoredForm) -> tuple[Group, ...]:
    """Return the groups of a checkpoint that stores all linear layers alike."""
    return (Group(Patterns((ALL_LINEAR,)), form),)


def refuse_unknown(values: ConfigValues, known: Sequence[str]) -> None:
    """Refuse an object with keys whose meaning is not known: they may say how weights are stored.

    Raises:
        BaseModelError: If a key that is not null is not among the known ones.
    """
    for key in values.names():
        if key not in known and values.has(key):
            raise values.unserved(key, "the key is not known", SERVE_INSTEAD)


def refuse_unless(values: ConfigValues, key: str, allowed: Sequence[object]) -> None:
    """Refuse an entry with another value than the allowed ones; an absent key and null are always allowed.

    Raises:
        BaseModelError: If it has.
    """
    if values.has(key) and values.raw(key) not in allowed:
        served = ", ".join(repr(each) for each in allowed)
        raise values.unserved(key, f"served: {served}", SERVE_INSTEAD)
