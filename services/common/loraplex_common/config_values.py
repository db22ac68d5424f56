"""Reads entries of a model's config.json by type; an error names the file, the key and what belongs there."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_REQUIRED: Final = object()


class BaseModelError(ValueError):
    """The directory is no base model we can serve; the message names the file and the remedy."""


def parse_json(data: str | bytes) -> Any:
    """Parse a JSON text of a model's files.

    Raises:
        ValueError: If it is none, or nested deeper than Python parses.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


class ConfigValues:
    """Reads entries; ``null`` counts as an entry of the wrong type unless a method says otherwise.

    It remembers which keys it was asked for: an entry that no reader asked for has not been understood (`unread`).

    Args:
        values: The JSON object.
        file: Name of the file, for messages.
        prefix: Prefix of keys in messages, for an object within the file.
    """

    def __init__(self, values: Mapping[str, Any], file: str, prefix: str = "") -> None:
        self._values = values
        self._file = file
        self._prefix = prefix
        self._asked: set[str] = set()
        self._sections: dict[str, ConfigValues] = {}

    def has(self, key: str) -> bool:
        """Tell whether the key is there and not null."""
        self._asked.add(key)
        return self._values.get(key) is not None

    def is_absent(self, key: str) -> bool:
        """Tell whether the key is not there at all."""
        self._asked.add(key)
        return key not in self._values

    def without_effect(self, *keys: str) -> None:
        """Say that entries change nothing here, because of what another entry or the architecture says."""
        self._asked.update(keys)

    def equals(self, other: ConfigValues) -> bool:
        """Tell whether two objects have equal entries."""
        return self._values == other._values

    def unread(self) -> list[tuple[str, Any]]:
        """Return the entries that no reader asked for, those of sections that were read included; null is no entry.

        Returns:
            Each one's key, with the keys of the objects that it lies in, and its value.
        """
        own = [(f"{self._prefix}{key}", self._values[key]) for key in self._values if key not in self._asked]
        inner = [entry for section in self._sections.values() for entry in section.unread()]
        return [(key, value) for key, value in own + inner if value is not None]

    def integer(self, key: str, default: object = _REQUIRED, *, least: int = 1, most: int | None = None) -> int:
        """Return an integer of at least ``least`` and at most ``most``; ``default`` if the key is absent.

        Raises:
            BaseModelError: If it is none, or absent without a default.
        """
        value = self._get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or value < least:
            raise self.wrong(key, f"expected an integer of at least {least}")
        if most is not None and value > most:
            raise self.wrong(key, f"expected an integer of at most {most}")
        return value

    def number(self, key: str, default: object = _REQUIRED, *, above: float = 0.0) -> float:
        """Return a finite number greater than ``above``; ``default`` if the key is absent.

        Raises:
            BaseModelError: If it is none, or absent without a default.
        """
        value = self._get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= above:
            raise self.wrong(key, f"expected a number greater than {above:g}")
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Return true or false; ``default`` if the key is absent, false for null, as transformers takes it.

        Raises:
            BaseModelError: If it is neither.
        """
        value = self._get(key, default)
        if value is not None and type(value) is not bool:
            raise self.wrong(key, "expected true or false")
        return bool(value)

    def text(self, key: str, default: str) -> str:
        """Return a string; ``default`` if the key is absent.

        Raises:
            BaseModelError: If it is none.
        """
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "expected a string")
        return value

    def texts(self, key: str) -> list[str] | None:
        """Return a list of strings; None for an absent key and for null.

        Raises:
            BaseModelError: If it is none.
        """
        value = self._get(key, None)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise self.wrong(key, "expected a list of strings")
        return value

    def integers(self, key: str) -> list[int] | None:
        """Return a list of integers; None for an absent key and for null.

        Raises:
            BaseModelError: If it is none.
        """
        value = self._get(key, None)
        if value is not None and not (isinstance(value, list) and all(type(item) is int for item in value)):
            raise self.wrong(key, "expected a list of integers")
        return value

    def numbers(self, key: str) -> list[float]:
        """Return a list of finite numbers greater than 0.

        Raises:
            BaseModelError: If it is none, or absent.
        """
        value = self._get(key, None)
        items: list[Any] = value if isinstance(value, list) else [None]
        if not all(type(item) in (int, float) and math.isfinite(item) and item > 0 for item in items):
            raise self.wrong(key, "expected a list of numbers greater than 0")
        return [float(item) for item in items]

    def section(self, key: str) -> ConfigValues | None:
        """Return an object's entries; None for an absent key, for null and for an empty object.

        Raises:
            BaseModelError: If it is none.
        """
        value = self._get(key, None)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "expected an object")
        if not value:
            return None
        return self._sections.setdefault(key, ConfigValues(value, self._file, f"{self._prefix}{key}."))

    def with_default(self, key: str, value: object) -> ConfigValues:
        """Return the same entries, with one more if its key is absent; what is asked of either is asked of both."""
        return self.with_defaults({key: value})

    def with_defaults(self, defaults: Mapping[str, object]) -> ConfigValues:
        """Return the same entries, with those whose keys are absent; what is asked of either is asked of both."""
        same = ConfigValues({**defaults, **self._values}, self._file, self._prefix)
        same._asked, same._sections = self._asked, self._sections
        return same

    def with_value(self, key: str, value: object) -> ConfigValues:
        """Return the same entries, but for one; what is asked of either is asked of both."""
        same = ConfigValues({**self._values, key: value}, self._file, self._prefix)
        same._asked, same._sections = self._asked, self._sections
        return same

    def names(self) -> list[str]:
        """Return the keys, those of null included."""
        return list(self._values)

    def raw(self, key: str) -> object:
        """Return a value of any type; None for an absent key."""
        return self._values.get(key)

    def pair(self, key: str) -> tuple[int, int] | None:
        """Return two positive integers; None for an absent key and for null.

        Raises:
            BaseModelError: If it is none.
        """
        value = self._values.get(key)
        if value is None:
            return None
        if not (isinstance(value, list) and len(value) == 2 and all(type(item) is int and item > 0 for item in value)):
            raise self.wrong(key, "expected two positive integers")
        return value[0], value[1]

    def group_size(self, key: str = "group_size") -> int | None:
        """Return how many inputs share a scale; None for -1, which means all of them.

        Raises:
            BaseModelError: If it is neither.
        """
        return None if self._values.get(key) == -1 else self.integer(key)

    def empty(self) -> ConfigValues:
        """Return what stands for an object that the file does not have: no entries."""
        return ConfigValues({}, self._file)

    def nested(self) -> list[str]:
        """Return the keys whose values are objects."""
        return [key for key, value in self._values.items() if isinstance(value, dict)]

    def problem(self, what: str) -> BaseModelError:
        """Return the error that says something of the whole file."""
        return BaseModelError(f"{self._file}: {what}")

    def wrong(self, key: str, expected: str) -> BaseModelError:
        """Return the error that says what is wrong with an entry."""
        value = repr(self._values[key])[:80] if key in self._values else "missing"
        return BaseModelError(
            f"{self._file}: {self._prefix}{key} is {'null' if value == 'None' else value}: {expected}; "
            "mend the entry, or fetch the model's config.json again"
        )

    def unserved(self, key: str, served: str, remedy: str = "serve a model without it") -> BaseModelError:
        """Return the error that says that a sound entry asks for what is not computed, and what to do about it."""
        value = repr(self._values.get(key))[:80]
        return BaseModelError(f"{self._file}: {self._prefix}{key} {value} is not served: {served}; {remedy}")

    def _get(self, key: str, default: object) -> Any:
        self._asked.add(key)
        value = self._values.get(key, default)
        return None if value is _REQUIRED else value
