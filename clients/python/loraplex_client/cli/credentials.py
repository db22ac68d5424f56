"""``loraplex credentials``: certificates, keys and passwords of a deployment."""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from loraplex_client.cli.context import stderr, stdout
from loraplex_client.cli.global_options import local
from loraplex_client.cli.option_groups import grouped

if TYPE_CHECKING:
    from loraplex_client.credentials.folder import Plan

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Make what the parts of a deployment prove themselves with."
)

Folder = Annotated[Path, typer.Argument(help="Gets a folder for each participant.", metavar="DIR", show_default=False)]
Hosts = list[str] | None


def _hosts(what: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        help=f"Name or address at which {what} is reached; may be given again.", metavar="HOST"
    )
    return option


@app.callback()
@local
def _group() -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class MakeOptions:
    """What is made, renewed and dropped."""

    gateway_host: Annotated[Hosts, _hosts("a gateway")] = None
    engine_host: Annotated[Hosts, _hosts("an engine")] = None
    store_host: Annotated[Hosts, _hosts("an adapter store")] = None
    valkey_host: Annotated[Hosts, _hosts("Valkey")] = None
    days: Annotated[int, typer.Option(help="How long certificates are good.", min=1, max=3650)] = 365
    keep_ca_key: Annotated[
        bool,
        typer.Option("--keep-ca-key", help="Keep the authority's key in DIR/ca, to renew without a new authority."),
    ] = False
    renew: Annotated[bool, typer.Option("--renew", help="Issue all certificates anew; those before stay trusted.")] = (
        False
    )
    renew_within: Annotated[int, typer.Option(help="Do that if one ends within so many days.", min=0)] = 0
    renew_keys: Annotated[
        bool, typer.Option("--renew-keys", help="Draw API keys and Valkey passwords anew; those before stay good.")
    ] = False
    drop_old: Annotated[
        bool, typer.Option("--drop-old", help="Trust what was renewed before no more: the end of every renewal.")
    ] = False
    gateway_target: Annotated[
        str | None, typer.Option(help="Written into admin/profile.json (127.0.0.1:8500).", metavar="HOST:PORT")
    ] = None
    store_target: Annotated[
        str | None, typer.Option(help="Written into admin/profile.json (127.0.0.1:8510).", metavar="HOST:PORT")
    ] = None

    @property
    def plan(self) -> "Plan":
        """The same, as the folder takes it."""
        from loraplex_client.credentials.folder import Plan

        hosts = {
            "gateway": self.gateway_host,
            "engine": self.engine_host,
            "adapter_store": self.store_host,
            "valkey": self.valkey_host,
        }
        return Plan(
            hosts={folder: tuple(names) for folder, names in hosts.items() if names},
            lifetime=datetime.timedelta(days=self.days),
            keeps_ca_key=self.keep_ca_key,
            renews=self.renew,
            renews_within=datetime.timedelta(days=self.renew_within),
            renews_keys=self.renew_keys,
            drops_old=self.drop_old,
            gateway_target=self.gateway_target,
            store_target=self.store_target,
        )


@app.command()
@local
@grouped
def make(directory: Folder, options: MakeOptions) -> None:
    """Make certificates, API keys and Valkey passwords; what is there already stays.

    Give each service its own folder and no other: gateway, engine, adapter_store, valkey. The folders admin, tenant and metrics
    are for people, clients and scrapers; `loraplex --profile DIR/admin/profile.json` is an administrator.
    """
    from loraplex_client.credentials.folder import CredentialsFolder

    folder = CredentialsFolder(directory)
    done = folder.make(options.plan)
    for line in done or ["nothing to do: all is there"]:
        print(f"{directory}: {line}")
    print(f"{directory}: the first certificate ends on {folder.ends:%Y-%m-%d}")


@app.command()
@local
def show(directory: Folder) -> None:
    """List the certificates: holder, names, and until when each is good. Fails if one has ended."""
    from loraplex_client.credentials.folder import CredentialsFolder
    from loraplex_client.credentials.parties import PARTIES

    folder = CredentialsFolder(directory)
    table = Table("WHO", "ENDS (UTC)", "NAMES", box=None)
    ended = []
    for party in PARTIES:
        if party.has_certificate:
            certificate = folder.certificate_of(party)
            table.add_row(party.folder, f"{certificate.ends:%Y-%m-%d %H:%M}", ", ".join(certificate.hosts) or "-")
            if certificate.ends < datetime.datetime.now(datetime.UTC):
                ended.append(party.folder)
    stdout.print(table)
    if ended:
        stderr.print(
            f"error: ended: {', '.join(ended)}; renew them with `loraplex credentials make {directory} --renew`"
        )
        raise typer.Exit(1)
