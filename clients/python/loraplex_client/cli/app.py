"""Puts the commands together and turns failures into one line on stderr and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import sys
import warnings
from typing import Final

import typer
from loraplex_common.errors import LoraplexError
from loraplex_common.hub_base import HubBaseError

from loraplex_client._profiles import ProfileError, StaleProfileWarning
from loraplex_client.cli import adapters, credentials, generate, load, model, plan, serve, status, top, usage
from loraplex_client.cli.global_options import local, remote, root
from loraplex_client.cli.wording import as_flags
from loraplex_client.credentials.errors import CredentialsError
from loraplex_client.demo.errors import DemoModelError
from loraplex_client.plan import PlanError
from loraplex_client.serve import PortError, ServeError, ShareError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in help texts are brackets
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serve LoRA adapters of one base model, and use them.",
)
app.command()(local(serve.serve))
app.command()(remote(generate.generate))
app.command()(remote(generate.chat))
app.add_typer(adapters.app, name="adapters")
app.add_typer(credentials.app, name="credentials")
app.command()(remote(status.status))
app.command()(remote(top.top))
app.command()(remote(usage.usage))
app.command()(local(plan.plan))
app.command()(remote(load.load))
app.command("fetch-model")(local(model.fetch_model))


@app.callback()
@root
def _root(context: typer.Context) -> None:
    pass


_TOLD: Final = (
    *(CredentialsError, DemoModelError, HubBaseError, PlanError, PortError, ProfileError, ServeError, ShareError),
)
"""What the user can mend; the message says how."""


def main() -> None:
    """Run the command line; interrupts and closed pipes are typer's business."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", StaleProfileWarning)
            warnings.showwarning = _note
            app(prog_name="loraplex")
    except LoraplexError as error:
        _fail(f"{error.reason}: {as_flags(error.message)}")
    except _TOLD as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("loraplex"):
            raise
        _fail(f"{error.name} is not installed; pip install 'loraplex[demo]' has everything")
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _note(message: Warning | str, *_: object, **__: object) -> None:
    print(f"note: {message}", file=sys.stderr)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
