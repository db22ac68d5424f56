"""Puts the commands together and turns failures into one line on stderr and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from loraplex_common.errors import LoraplexError

from loraplex_client.cli import adapters, generate, load, model, plan, serve, status
from loraplex_client.cli.context import Credentials
from loraplex_client.cli.wording import as_flags
from loraplex_client.demo.errors import DemoModelError
from loraplex_client.plan import PlanError
from loraplex_client.serve import ServeError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in help texts are brackets
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serve LoRA adapters of one base model, and use them.",
)
app.command()(serve.serve)
app.command()(generate.generate)
app.command()(generate.chat)
app.add_typer(adapters.app, name="adapters")
app.command()(status.status)
app.command()(plan.plan)
app.command()(load.load)
app.command("fetch-model")(model.fetch_model)


@app.callback()
def _credentials(
    context: typer.Context,
    api_key: Annotated[
        str | None, typer.Option(envvar="LORAPLEX_API_KEY", help="API key sent with every call.", show_envvar=True)
    ] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(envvar="LORAPLEX_TLS_CA", help="Certificates to trust, PEM; turns TLS on.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(envvar="LORAPLEX_TLS_CERT", help="Client certificate, PEM, for mutual TLS.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(envvar="LORAPLEX_TLS_KEY", help="Key of the client certificate, PEM.")
    ] = None,
) -> None:
    if (tls_cert is None) != (tls_key is None) or (tls_cert is not None and tls_ca is None):
        raise typer.BadParameter("--tls-cert needs --tls-key and --tls-ca")
    context.obj = Credentials(api_key=api_key, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key)


def main() -> None:
    """Run the command line; interrupts and closed pipes are typer's business."""
    try:
        app(prog_name="loraplex")
    except LoraplexError as error:
        _fail(f"{error.reason}: {as_flags(error.message)}")
    except (DemoModelError, PlanError, ServeError) as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("loraplex"):
            raise
        _fail(f"{error.name} is not installed; pip install 'loraplex[demo]' has everything")
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
