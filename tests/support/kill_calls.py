"""The calls that `support.store_kills` cuts, and what names are after them."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from loraplex.v1 import adapter_pb2
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_adapter_store.checkpoint.canonical import canonicalise
from loraplex_adapter_store.checkpoint.reader import read_checkpoint
from loraplex_common.base_model import load_base_model
from support.adapters import Recipe, adapter_files, write_adapter
from support.pushes import push_messages
from support.store_rig import StoreClient, new_id, tiny_base_dir

if TYPE_CHECKING:
    import random
    from pathlib import Path

Names: TypeAlias = dict[str, dict[str, str]]
"""Name -> label -> revision; deleted names are left out."""
KINDS: Final = ("upload", "import", "push", "move", "delete", "attach")
NUM_NAMES: Final = 5
_SEEDS: Final[dict[str, int]] = {}


@dataclass(frozen=True, slots=True)
class Call:
    """A call that can be repeated.

    Attributes:
        digest: Revision that it is about; empty for a deletion.
        labels: Labels that point at the revision afterwards.
    """

    kind: str
    name: str
    digest: str
    labels: tuple[str, ...]
    make: Callable[[StoreClient], Awaitable[Any]] = field(repr=False)


def apply(names: Names, call: Call) -> Names:
    """Return the names after a call."""
    after = {name: dict(labels) for name, labels in names.items()}
    if call.kind == "delete":
        after.pop(call.name, None)
    for label in call.labels:
        after.setdefault(call.name, {})[label] = call.digest
    return after


@functools.cache
def digest_of(seed: int) -> str:
    """Return the revision of a random adapter."""
    base, files = load_base_model(tiny_base_dir()), adapter_files(tiny_base_dir(), Recipe(seed=seed))
    checkpoint = read_checkpoint(files["adapter_config.json"], files["adapter_model.safetensors"], base)
    digest = canonicalise(checkpoint).revision
    _SEEDS[digest] = seed
    return digest


def import_again(name: str, digest: str) -> Call:
    """Return the call that imports a revision which was imported before, as the message on a damaged one says."""
    files, request_id = adapter_files(tiny_base_dir(), Recipe(seed=_SEEDS[digest])), new_id()
    make = lambda client: client.upload(name, files, request_id=request_id)  # noqa: E731
    return Call("upload", name, digest, ("latest",), make)


def make_call(kind: str, rng: random.Random, names: Names, directory: Path) -> Call:
    """Return a random call of a kind; one that needs an adapter imports it where there is none."""
    name, seed = f"n{rng.randrange(NUM_NAMES)}", rng.randrange(1000)
    if kind in ("move", "delete", "attach") and names:
        name = rng.choice(sorted(names))
    elif kind in ("move", "delete", "attach"):
        kind = "upload"
    digest, request_id = digest_of(seed), new_id()
    match kind:
        case "upload":
            files = adapter_files(tiny_base_dir(), Recipe(seed=seed))
            make = lambda client: client.upload(name, files, label="prod", request_id=request_id)  # noqa: E731
            return Call(kind, name, digest, ("latest", "prod"), make)
        case "import":
            folder = write_adapter(directory / "imports" / str(seed), tiny_base_dir(), Recipe(seed=seed))
            make = lambda client: client.import_dir(name, folder, request_id=request_id)  # noqa: E731
            return Call(kind, name, digest, ("latest",), make)
        case "push":
            expected = names.get(name, {}).get("latest", "")
            messages = push_messages(name, seed, expected=expected)
            make = lambda client: client.stub.PushAdapter(iter(messages))  # noqa: E731
            return Call(kind, name, digest, ("latest",), make)
        case "move":
            digest = rng.choice(sorted(set(names[name].values())))
            alias = adapter_pb2.Alias(name=name, label=f"l{rng.randrange(2)}", revision=digest)
            make = lambda client: client.stub.SetAlias(pb.SetAliasRequest(alias=alias, request_id=request_id))  # noqa: E731
            return Call(kind, name, digest, (alias.label,), make)
        case "delete":
            request = pb.DeleteAdapterRequest(name=name, request_id=request_id, force=True)
            return Call(kind, name, "", (), lambda client: client.stub.DeleteAdapter(request))
        case _:
            return Call(kind, name, rng.choice(sorted(set(names[name].values()))), (), _no_call)


async def _no_call(client: StoreClient) -> None:
    raise AssertionError("an engine's side of the protocol, not a call")
