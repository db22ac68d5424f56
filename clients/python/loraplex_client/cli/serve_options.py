"""What the options of ``loraplex serve`` mean: checked before anything is started."""

import os
from collections.abc import Mapping
from pathlib import Path

import typer
from loraplex_common import log
from loraplex_common.base_model import BaseModelError, load_base_model
from loraplex_common.directories import adapter_directory_problem, model_directory_problem

from loraplex_client.cli.registered import refuse_password_in_view
from loraplex_client.serve import ServeError, ValkeyAccess


def check_base(base: Path, log_level: str) -> None:
    """Refuse a base model that no service would serve before any is started; hash its weights, once for all of them.

    Raises:
        ServeError: If it cannot be served.
    """
    try:
        log.configure("serve", log_level)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--log-level") from error
    try:
        load_base_model(base)
    except BaseModelError as error:
        raise ServeError(str(error)) from error


def valkey(
    context: typer.Context, url: str | None, password_file: Path | None, tls_ca: Path | None
) -> ValkeyAccess | None:
    """Return which Valkey to use; None for an embedded one."""
    if url is None:
        if password_file or tls_ca:
            raise typer.BadParameter("--redis-password-file and --redis-tls-ca go with a --redis-url")
        return None
    refuse_password_in_view(context, url)
    return ValkeyAccess(url=url, password_file=absolute(password_file), tls_ca=absolute(tls_ca))


def metrics_key(file: Path | None) -> str | None:
    """Return the key that the environment has instead of a file."""
    key = os.environ.get("LORAPLEX_METRICS_KEY")
    if key and file:
        raise typer.BadParameter("both --metrics-key-file and LORAPLEX_METRICS_KEY are given: which of the two counts?")
    return key or None


def absolute(path: Path | None) -> Path | None:
    """Return a path that means the same in every process."""
    return None if path is None else path.expanduser().absolute()


def check_directories(model: Path | None, import_roots: list[Path]) -> None:
    """Refuse what is not there before anything is fetched."""
    if model is not None and (problem := model_directory_problem(model)):
        raise typer.BadParameter(problem, param_hint="--model")
    for root in import_roots:
        if problem := adapter_directory_problem(root):
            raise typer.BadParameter(problem, param_hint="--import-root")


def flags(options: Mapping[str, object], *repeated: tuple[str, list[str] | tuple[str, ...]]) -> tuple[str, ...]:
    """Return the options that were given as words of a command line."""
    words = [word for flag, value in options.items() if value is not None for word in (flag, str(value))]
    return (*words, *(word for flag, values in repeated for value in values for word in (flag, value)))


def demo_adapters(demo_dir: Path | None) -> dict[str, Path]:
    """Return the demo's adapters by name.

    Raises:
        ServeError: If they are nowhere.
    """
    checkout = Path(__file__).resolve().parents[4]
    places = [demo_dir] if demo_dir else [checkout / "examples" / "demo", Path.cwd() / "examples" / "demo"]
    for place in places:
        found = {config.parent.name: config.parent for config in sorted(place.glob("adapters/*/adapter_config.json"))}
        if found:
            return found
    raise ServeError(f"no adapters below {' or '.join(map(str, places))}: give --demo-dir, or run it from a checkout")
