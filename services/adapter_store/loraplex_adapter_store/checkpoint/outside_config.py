"""What a configuration does to modules outside of the decoder layers: which it replaces, in whole or by rows, and what it ties.

PEFT's rules, of which each was tried with PEFT 0.21 on tied and untied models (``tests/unit/adapter_store/outside``):

* ``modules_to_save`` gives a module a matrix of its own, also where the base ties it; a module with one has no LoRA.
* ``trainable_token_indices`` without names are the embedding's, and on a tied base lm_head's too, unless it has others.
* ``ensure_weight_tying`` makes lm_head of a tied base follow the embedding, in modules_to_save as in LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.adapter_folder import CONFIG_FILE
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError

from loraplex_adapter_store.checkpoint.outside_names import EMBED, HEAD

if TYPE_CHECKING:
    from collections.abc import Collection

SAVED, INDICES, TIES = "modules_to_save", "trainable_token_indices", "ensure_weight_tying"
MAX_INDICES: Final = 65_536
"""Most entries of trainable_token_indices, of all modules together."""
NAMES: Final = (EMBED, HEAD)


@dataclass(frozen=True, slots=True)
class OutsideConfig:
    """The settings.

    Attributes:
        saved: Modules whose matrix is replaced.
        tokens: Module -> ids of the rows that are replaced, in the order of the tensor.
        ties: Whether lm_head follows the embedding where the base ties it.
    """

    saved: frozenset[str] = frozenset()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ties: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What one module gets.

    Attributes:
        is_saved: Its matrix is replaced.
        is_adapted: It has a pair.
        tokens: Ids of rows that are replaced.
        follows: Its own tensors are the embedding's.
        follows_tokens: Its replaced rows are the embedding's.
    """

    is_saved: bool = False
    is_adapted: bool = False
    tokens: tuple[int, ...] = ()
    follows: bool = False
    follows_tokens: bool = False


def read_outside(fields: Mapping[str, Any]) -> OutsideConfig:
    """Read the settings of adapter_config.json.

    Raises:
        AdapterCorruptUploadError: If one has the wrong type.
        AdapterIncompatibleError: If one names a module that is not served.
    """
    ties = fields.get(TIES)
    if not isinstance(ties, bool | None):
        raise AdapterCorruptUploadError(f"{CONFIG_FILE}: {TIES} is not true or false")
    return OutsideConfig(frozenset(_saved(fields.get(SAVED))), _tokens(fields.get(INDICES)), bool(ties))


def _saved(value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise AdapterCorruptUploadError(f"{CONFIG_FILE}: {SAVED} is no list of names")
    return [_module(name, SAVED) for name in names]


def _tokens(value: Any) -> dict[str, tuple[int, ...]]:
    named = value if isinstance(value, dict) else {EMBED: value or []}
    found: dict[str, tuple[int, ...]] = {}
    for name, ids in named.items():
        if not isinstance(ids, list) or not all(type(each) is int for each in ids):
            raise AdapterCorruptUploadError(f"{CONFIG_FILE}: {INDICES} is no list of token ids")
        if len(ids) > MAX_INDICES:
            raise AdapterCorruptUploadError(
                f"{CONFIG_FILE}: {INDICES} has {len(ids)} tokens, at most {MAX_INDICES} are read"
            )
        if len(set(ids)) < len(ids) or min(ids, default=0) < 0:
            raise AdapterIncompatibleError(
                f"{CONFIG_FILE}: {INDICES} has a token twice or a negative one, of which PEFT makes no certain row"
            )
        module = _module(name, INDICES)
        if module in found:
            raise AdapterIncompatibleError(f"{CONFIG_FILE}: {INDICES} names {module} twice")
        if ids:
            found[module] = tuple(ids)
    return found


def _module(name: str, setting: str) -> str:
    last = name.rpartition(".")[2]
    if last not in NAMES:
        raise AdapterIncompatibleError(
            f"{CONFIG_FILE}: {setting} names {name[:100]!r}: trained modules other than {' and '.join(NAMES)} are not served; "
            "train with LoRA on the projections"
        )
    return last


def planned(config: OutsideConfig, targets: Collection[str], *, is_list: bool, is_tied: bool) -> dict[str, Plan]:
    """Return what PEFT does to each module that anything is done to.

    Args:
        config: The settings.
        targets: Modules that ``target_modules`` names.
        is_list: Whether it names them in a list, not by a pattern.
        is_tied: Whether the base model's config.json ties the two.

    Raises:
        AdapterIncompatibleError: If PEFT refuses or confuses the combination; the message has the settings.
    """
    saved, adapted = set(config.saved), set(targets) - config.saved
    ties = config.ties and is_tied
    if ties and saved and adapted:
        raise _confused(f"{TIES} with both {SAVED} and target_modules")
    if ties and adapted and not is_list:
        raise _confused(f"{TIES} with a pattern for target_modules, whose matches it changes")
    if ties and saved:
        saved = {*NAMES}
    if ties and adapted:
        adapted = {*NAMES}
    tokens = dict(config.tokens)
    follows_tokens = is_tied and EMBED in tokens and tokens.get(HEAD, tokens[EMBED]) == tokens[EMBED]
    if follows_tokens:
        tokens[HEAD] = tokens[EMBED]
    elif ties and len(tokens) > 1:
        raise _confused(f"{TIES} with different {INDICES} for {' and '.join(NAMES)}")
    for name in tokens:
        if name in saved:
            raise _confused(
                f"{name} in {SAVED} together with {INDICES}{' of the embedding that it is tied to' if name == HEAD and follows_tokens else ''}"
            )
        if name in adapted and not (name == HEAD and follows_tokens):
            raise _confused(f"{name} in target_modules together with {INDICES}")
    return {
        name: Plan(
            is_saved=name in saved,
            is_adapted=name in adapted,
            tokens=tokens.get(name, ()),
            follows=name == HEAD and ties and HEAD in saved | adapted,
            follows_tokens=name == HEAD and follows_tokens,
        )
        for name in NAMES
    }


def _confused(what: str) -> AdapterIncompatibleError:
    return AdapterIncompatibleError(
        f"{CONFIG_FILE}: {what} is not served: PEFT cannot load it as it was trained; train one of them"
    )
