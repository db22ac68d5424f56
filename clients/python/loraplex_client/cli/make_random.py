"""``loraplex adapters make-random``: many adapters for a load test."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from loraplex_client._sync.client import Client
from loraplex_client.cli.context import StoreTarget, connect, stderr, stdout
from loraplex_client.cli.option_groups import grouped
from loraplex_client.demo import demo_model_dir
from loraplex_client.plan import DemandError, read_ranks
from loraplex_client.random_adapters import RandomAdapterError, RandomAdapters, read_layers, read_targets

NUM_UPLOADS: Final = 4
"""At once: each waits for the store's disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyOptions:
    """What the adapters have in common."""

    model: Annotated[
        Path | None, typer.Option(help="The base model's directory (default: the demo's).", metavar="DIR")
    ] = None
    base_model: Annotated[
        str, typer.Option(help="Name of the base model to write into them (default: its directory's).")
    ] = ""
    ranks: Annotated[str, typer.Option(help="Ranks; adapter i has the (i mod n)-th.", metavar="R,R,...")] = "8"
    targets: Annotated[
        str, typer.Option(help="all projections, qkvo, or a list such as q_proj,v_proj.", metavar="NAMES")
    ] = "all"
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16"
    seed: Annotated[int, typer.Option(help="Of the weights; the same seed makes the same adapters.", min=0)] = 0

    def adapters(self) -> RandomAdapters:
        """Return what writes them."""
        base = self.model or demo_model_dir()
        try:
            layers = read_layers(base)
            return RandomAdapters(
                layers=layers,
                base_model=self.base_model or base.resolve().name,
                ranks=tuple(read_ranks(self.ranks)),
                targets=read_targets(self.targets, layers),
                dtype=self.dtype,
                seed=self.seed,
            )
        except (RandomAdapterError, DemandError) as error:
            raise typer.BadParameter(str(error)) from error


@grouped
def make_random(
    context: typer.Context,
    *,
    number: Annotated[int, typer.Argument(help="How many.", metavar="N", min=1, show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder that gets one directory per adapter.", metavar="DIR")] = Path(
        "random-adapters"
    ),
    family: FamilyOptions,
    prefix: Annotated[str, typer.Option(help="Names are PREFIX and the adapter's number.")] = "random-",
    do_import: Annotated[bool, typer.Option("--import", help="Import them, too.")] = False,
    store_target: StoreTarget = None,
) -> None:
    """Make N random adapters, valid for the base model, to test a deployment with."""
    adapters = family.adapters()
    digits = len(str(number - 1))
    names = [f"{prefix}{i:0{digits}}" for i in range(number)]
    with stderr.status(f"writing {number} adapters"):
        for i, name in enumerate(names):
            adapters.write(i, out / name)
    if do_import:
        with connect(context, store_target=store_target) as client:
            _import_all(client, names, out)
    done = "wrote and imported" if do_import else "wrote"
    stdout.print(f"{done} {number} adapters: {out / names[0]} to {names[-1]}", soft_wrap=True)


def _import_all(client: Client, names: list[str], out: Path) -> None:
    with ThreadPoolExecutor(NUM_UPLOADS) as pool, stderr.status("importing") as status:
        uploads = [pool.submit(client.adapters.upload, name, out / name) for name in names]
        try:
            for done, upload in enumerate(uploads, start=1):
                upload.result()
                status.update(f"imported {done} of {len(uploads)} adapters")
        finally:
            for upload in uploads:
                upload.cancel()  # after a failure; running ones end first
