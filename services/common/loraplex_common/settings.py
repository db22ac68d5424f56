"""One frozen dataclass of configuration per service, read once from flags and ``LORAPLEX_*`` variables.

A field is a flag: ``max_num_seqs: int = setting(256, help="...")`` is ``--max-num-seqs`` and, for the engine,
``LORAPLEX_ENGINE_MAX_NUM_SEQS``. A flag has precedence over the variable, the variable over the default.

Every user of the machine can read command lines, so no flag takes a secret: ``metrics_key: Secret | None =
secret(help="...")`` is ``--metrics-key-file``, ``LORAPLEX_ENGINE_METRICS_KEY_FILE`` or ``LORAPLEX_ENGINE_METRICS_KEY``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import types
import typing
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, Union

from loraplex_common.secret import Secret
from loraplex_common.sizes import parse_size, size_as_flag
from loraplex_common.version import version_line

if typing.TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})

Config = TypeVar("Config")


class SettingsError(ValueError):
    """A variable has a value that is not valid for its setting; the message names it."""


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    parse: Callable[[str], Any] | None = None,
    parse_flag: Callable[[str], Any] | None = None,
    show: Callable[[Any], Any] | None = None,
    metavar: str | None = None,
) -> Any:
    """Declare a field of a configuration dataclass.

    Args:
        default: Value without a flag or a variable; if there is no default, the setting is required.
        help: One line for ``--help``.
        parse: Turns text into the value; by default chosen by the field's type. See `size`.
        parse_flag: The same for the command line, where less is allowed; by default ``parse``.
        show: Turns the value into its form for the log and ``--help``; by default the whole value is shown.
        metavar: Placeholder in ``--help``.
    """
    metadata = {"help": help, "parse": parse, "parse_flag": parse_flag, "show": show, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


def secret(*, help: str) -> Any:
    """Declare a field that holds a `Secret`, or None: a flag and a variable for a file, a variable for the value."""
    return dataclasses.field(default=None, metadata={"help": help, "is_secret": True})


def size(default: Any = dataclasses.MISSING, *, help: str) -> Any:
    """Declare a field in bytes, written like ``512MiB``."""
    return setting(default, help=help, parse=parse_size, show=size_as_flag, metavar="SIZE")


def load(
    config: type[Config],
    *,
    service: str,
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
    description: str | None = None,
) -> Config:
    """Build a configuration from the command line and the environment.

    Args:
        config: A dataclass whose fields are declared with `setting`.
        service: Middle part of the variables' names and part of ``prog``, e.g. ``engine`` or ``adapter_store``.
        argv: Arguments without the program's name; by default the process's arguments.
        environ: The variables; by default the process's environment.
        description: Head of ``--help``; by default the first line of the class's docstring.

    Raises:
        SystemExit: On ``--help``, ``--version`` and on bad input, after a message in argparse's form.
    """
    environment = os.environ if environ is None else environ
    prefix = f"LORAPLEX_{service.upper()}_"
    fields = _fields(config)
    parser = _parser(service, description or (config.__doc__ or "").partition("\n")[0], prefix, fields)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    values: dict[str, Any] = {}
    try:
        for name, (field, hint) in fields.items():
            variable = prefix + name.upper()
            if _is_secret(field):
                values[name] = _read_secret(name, given, environment, variable)
            elif name in given:
                values[name] = tuple(given[name]) if _is_list(hint) else given[name]
            elif (text := environment.get(variable)) is not None:
                values[name] = _from_text(text, field, hint, variable)
            elif field.default is dataclasses.MISSING:
                parser.error(f"--{name.replace('_', '-')} (or {variable}) is required")
        return config(**values)
    except ValueError as error:
        parser.error(str(error))


def _fields(config: type[Any]) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Return a configuration's fields and their types by name."""
    hints = typing.get_type_hints(config)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(config)}


def _parser(
    service: str, description: str, prefix: str, fields: Mapping[str, tuple[dataclasses.Field[Any], Any]]
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"loraplex-{service.replace('_', '-')}",
        description=description,
        epilog=f"Every flag can be given as {prefix}<FLAG>; lists are separated by commas there.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=version_line(f"loraplex-{service.replace('_', '-')}"))
    for name, (field, hint) in fields.items():
        _add_flag(parser, name, field, hint)
    return parser


def _is_secret(field: dataclasses.Field[Any]) -> bool:
    return bool(field.metadata.get("is_secret", False))


def _read_secret(name: str, given: Mapping[str, Any], environment: Mapping[str, str], variable: str) -> Secret | None:
    """Return a secret from the first place that has it: the flag, the variable with a file, the variable itself."""
    path, text = given.get(f"{name}_file"), environment.get(variable)
    source = f"--{name.replace('_', '-')}-file"
    if path is None and (named := environment.get(f"{variable}_FILE")) is not None:
        if text is not None:
            raise SettingsError(f"{variable} and {variable}_FILE are both set: give one")
        path, source = Path(named).expanduser(), f"{variable}_FILE"
    if path is None:
        return Secret(text) if text else None
    try:
        return Secret.from_file(path)
    except OSError as error:
        raise SettingsError(f"{source}: {path}: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"{source}: {error}") from error


def describe(config: Any) -> dict[str, Any]:
    """Return the resolved configuration for the log, secrets hidden."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        show = field.metadata.get("show")
        result[field.name] = _plain(value) if show is None or value is None else show(value)
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, Path | Secret):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (Union, types.UnionType):
        (only,) = [argument for argument in typing.get_args(hint) if argument is not type(None)]
        return only
    return hint


def _is_list(hint: Any) -> bool:
    return typing.get_origin(_without_none(hint)) is tuple


def _item_type(hint: Any) -> Any:
    plain = _without_none(hint)
    return typing.get_args(plain)[0] if _is_list(plain) else plain


def _converter(field: dataclasses.Field[Any], hint: Any) -> Callable[[str], Any]:
    if field.metadata.get("parse") is not None:
        return typing.cast("Callable[[str], Any]", field.metadata["parse"])
    kind = _item_type(hint)
    if typing.get_origin(kind) is Literal:
        return _one_of(typing.get_args(kind))
    if kind is bool:
        return _parse_bool
    if kind is Path:
        return _parse_path
    if kind in (str, int, float):
        return typing.cast("Callable[[str], Any]", kind)
    raise TypeError(f"setting {field.name}: give `parse` for type {kind}")


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return check


def _parse_path(text: str) -> Path:
    if not text.strip():  # an unset shell variable; as a path: the current folder
        raise ValueError("it is empty: name a path, or leave it out")
    return Path(text).expanduser()


def _parse_bool(text: str) -> bool:
    if text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    raise ValueError(f"{text!r} is neither true nor false")


def _from_text(text: str, field: dataclasses.Field[Any], hint: Any, variable: str) -> Any:
    convert = _converter(field, hint)
    try:
        if _is_list(hint):
            return tuple(convert(item.strip()) for item in text.split(",") if item.strip())
        return convert(text)
    except ValueError as error:
        raise SettingsError(f"{variable}: {error}") from error


def _add_flag(parser: argparse.ArgumentParser, name: str, field: dataclasses.Field[Any], hint: Any) -> None:
    if _is_secret(field):
        _add_secret_flag(parser, name, field)
        return
    flag, convert = f"--{name.replace('_', '-')}", field.metadata.get("parse_flag") or _converter(field, hint)
    show = field.metadata.get("show") or str
    default = "" if field.default in (dataclasses.MISSING, None, ()) else f" (default: {show(field.default)})"
    text = (field.metadata.get("help", "") + default).replace("%", "%%")
    if _item_type(hint) is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        return

    def parse(raw: str) -> Any:
        try:
            return convert(raw)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    kind = _item_type(hint)
    choices = "{" + ",".join(typing.get_args(kind)) + "}" if typing.get_origin(kind) is Literal else None
    action = "append" if _is_list(hint) else "store"
    metavar = field.metadata.get("metavar") or choices
    parser.add_argument(flag, action=action, type=parse, default=None, help=text, metavar=metavar)


def _add_secret_flag(parser: argparse.ArgumentParser, name: str, field: dataclasses.Field[Any]) -> None:
    text = f"file with {field.metadata['help']}; read again when it changes".replace("%", "%%")
    parser.add_argument(
        f"--{name.replace('_', '-')}-file", type=lambda raw: Path(raw).expanduser(), help=text, metavar="FILE"
    )
