"""What a configuration says about each projection of a base model, by PEFT's rules: adapted or not, rank and alpha."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.adapter_folder import CONFIG_FILE
from loraplex_common.errors import AdapterIncompatibleError

from loraplex_adapter_store.checkpoint.patterns import Answer, PatternMatcher, Question, ends, resolved
from loraplex_adapter_store.checkpoint.tensor_names import module_name

if TYPE_CHECKING:
    from loraplex_common.base_model import BaseModelInfo
    from loraplex_common.projections import Projection

    from loraplex_adapter_store.checkpoint.peft_config import PeftConfig


class ModuleRules:
    """A configuration's rules; all their patterns are matched at once.

    Args:
        matcher: Matches the patterns.
        prefix: What the names that patterns mean begin with in the place of ``model.``; see `Normalised`.

    Raises:
        AdapterIncompatibleError: If matching takes too long or too much memory; the message names the setting.
    """

    def __init__(
        self, config: PeftConfig, base: BaseModelInfo, matcher: PatternMatcher, prefix: str = "model."
    ) -> None:
        self._config = config
        self._base = base
        self._modules = [
            (layer, each, module_name(layer, each.path))
            for layer, offered in enumerate(base.layers)
            for each in offered
        ]
        keys = (*(each.path for each in base.outside), *(name for _, _, name in self._modules))
        questions = _questions(config, tuple(_trained_name(key, prefix) for key in keys))
        self._answers: dict[str, dict[str, Answer]] = {
            question.setting: dict(zip(keys, found, strict=True))
            for question, found in zip(questions, matcher.ask(questions), strict=True)
        }
        self._targets = _listed(config.target_modules)
        self._excluded = _listed(config.exclude_modules)

    def targeted(self) -> list[tuple[int, Projection]]:
        """Return (layer, projection) of all modules of the layers that PEFT would adapt, in layer order.

        Raises:
            AdapterIncompatibleError: If there are none, and none outside of the layers either.
        """
        if not self._config.target_modules:
            raise AdapterIncompatibleError(f"{CONFIG_FILE}: target_modules is missing: name the adapted modules")
        found = [(layer, projection) for layer, projection, name in self._modules if self._is_targeted(name, layer)]
        if not found and not self.targeted_outside():
            raise AdapterIncompatibleError(
                f"{CONFIG_FILE}: target_modules (with exclude_modules and layers_to_transform) matches no projection of base "
                f"model {self._base.name}"
            )
        return found

    def targeted_outside(self) -> list[Projection]:
        """Return the modules outside of the layers that PEFT would adapt if ``modules_to_save`` did not replace them."""
        if self._is_all_linear():  # PEFT leaves the output layer out, and the embedding is not linear
            return []
        return [each for each in self._base.outside if self._is_targeted(each.path, None)]

    def rank(self, key: str) -> int:
        """Return the rank of a module."""
        if key in self._config.ranks:
            return self._config.ranks[key]
        index = self._answer("rank_pattern", key)
        return self._config.rank if index is None else list(self._config.rank_pattern.values())[index]

    def alpha(self, key: str) -> tuple[float, str]:
        """Return alpha of a module, and the setting that gives it."""
        index = self._answer("alpha_pattern", key)
        if index is None:
            return self._config.alpha, "lora_alpha"
        name, alpha = list(self._config.alpha_pattern.items())[index]
        return alpha, f"alpha_pattern[{name!r}]"

    def is_feedforward(self, key: str) -> bool:
        """Return whether (IA)3 scales a module's input, by PEFT's rule: any end of its name counts, not only whole parts."""
        names = self._config.feedforward_modules
        if isinstance(names, str):
            return self._answer("feedforward_modules", key) is not None
        return key.endswith(names)

    def _is_all_linear(self) -> bool:
        return isinstance(self._config.target_modules, str) and self._config.target_modules.lower() == "all-linear"

    def _is_targeted(self, key: str, layer: int | None) -> bool:
        """Apply PEFT's `check_target_module_exists` to one module name."""
        if self._answer("exclude_modules", key) is not None or not self._excluded.isdisjoint(ends(key)):
            return False
        if self._is_all_linear():
            return True
        if isinstance(self._config.target_modules, str):
            return self._answer("target_modules", key) is not None
        if key in self._targets:
            return True
        if self._targets.isdisjoint(ends(key)):
            return False
        if self._config.layers_to_transform is None:
            return True
        if self._config.layers_pattern:
            layer = self._answer("layers_pattern", key)
        return layer in self._config.layers_to_transform

    def _answer(self, setting: str, key: str) -> int | None:
        answers = self._answers.get(setting)
        return None if answers is None else resolved(answers[key], setting)


def _trained_name(key: str, prefix: str) -> str:
    """Return a module's name in the model that the adapter was trained on."""
    if key.startswith("model."):
        return prefix + key.removeprefix("model.")
    return f"language_model.{key}" if prefix == "language_model.model." else key


def _listed(names: str | tuple[str, ...]) -> frozenset[str]:
    return frozenset() if isinstance(names, str) else frozenset(names)


def _questions(config: PeftConfig, keys: tuple[str, ...]) -> list[Question]:
    """Return the questions for the matcher; names in lists are no patterns."""
    questions = [
        Question(setting=setting, kind="whole", patterns=(pattern,), keys=keys)
        for setting, pattern in (
            ("exclude_modules", config.exclude_modules),
            ("target_modules", config.target_modules),
            ("feedforward_modules", config.feedforward_modules),
        )
        if isinstance(pattern, str)
    ]
    if config.layers_to_transform is not None and config.layers_pattern:
        questions.append(Question(setting="layers_pattern", kind="layer", patterns=config.layers_pattern, keys=keys))
    for setting, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        if patterns:
            questions.append(Question(setting=setting, kind="suffix", patterns=tuple(patterns), keys=keys))
    return questions
