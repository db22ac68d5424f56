"""What ``loraplex serve`` looks at before anything is started."""

from pathlib import Path

import typer
from loraplex_common import log
from loraplex_common.base_model import BaseModelError, load_base_model
from loraplex_common.directories import adapter_directory_problem, model_directory_problem

from loraplex_client.cli.model import ensure_with_progress, fetch_and_tell
from loraplex_client.cli.serve_options import BaseOptions
from loraplex_client.serve import ServeError


def check_base(base: Path, log_level: str, *, text_only: bool) -> None:
    """Refuse a base model that no service would serve before any is started; hash its weights, once for all of them.

    Raises:
        ServeError: If it cannot be served.
    """
    try:
        log.configure("serve", log_level)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--log-level") from error
    try:
        load_base_model(base, text_only=text_only)
    except BaseModelError as error:
        raise ServeError(str(error)) from error


def check_directories(model: Path | None, import_roots: list[Path]) -> None:
    """Refuse what is not there before anything is fetched."""
    if model is not None and (problem := model_directory_problem(model)):
        raise typer.BadParameter(problem, param_hint="--model")
    for root in import_roots:
        if problem := adapter_directory_problem(root):
            raise typer.BadParameter(problem, param_hint="--import-root")


def fetched(base: BaseOptions) -> Path:
    """Return the base model's directory; fetch it if it is one of the hub's, or the demo's."""
    if base.model is None:
        return ensure_with_progress()
    return fetch_and_tell(str(base.model)) if base.hub_name else base.model


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
