"""Store and Valkey are killed at any step of imports, pushes, moves, deletions and deliveries: nothing is lost or half there.

``python -m support.store_kills --kills 200`` (a part of ``make campaign``) runs any number of kills; the test suite runs a few.
All that a store says to its Valkey passes through a proxy that counts it, so that a kill comes at a step drawn from a seed:
before Valkey has heard of it, or when it has done it and the store does not know. After each kill, names and labels must be
what was acknowledged, or, of the call that was cut, what it asked for and all of that; the call repeated with its request_id
must succeed; an engine's side of the protocol must get the images byte for byte. Beside the kills Valkey is full for a while,
and bits are flipped in chunks, in files of the disk cache and in the arena.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import AdapterCorruptError, LoraplexError, SaturatedError
from loraplex_common.grpc_channel import open_channel
from loraplex_common.valkey import EmbeddedValkey, connect
from support.forked_store import ForkedStore
from support.kill_calls import KINDS, Call, Names, apply, import_again, make_call
from support.store_engine_peer import EnginePeer, attached_peer
from support.store_rig import StoreClient, tiny_base_dir, translated
from support.valkey_proxy import ValkeyProxy

if TYPE_CHECKING:
    from numpy.typing import NDArray

CALL_S: Final = 20.0
PAGE_BYTES: Final = 16 * 1024
DAMAGE_EVERY: Final = 8
"""Rounds between two of the faults that kill nothing."""


@dataclass
class KillTally:
    """The results of a campaign.

    Attributes:
        num_kills: Kills by victim, the call that was under way, and whether Valkey had heard of the step.
        num_done: Calls that were cut, and had been done all the same.
        num_images: Images that an engine's side took and compared.
        num_damages: Faults that kill nothing, by kind.
        wrong: What went wrong, with the number of its round.
    """

    seed: int
    kills: int
    num_kills: dict[str, int] = field(default_factory=dict)
    num_done: int = 0
    num_images: int = 0
    num_damages: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


class _Campaign:
    """One Valkey, one store at a time, and what both have acknowledged."""

    def __init__(self, directory: Path, valkey: EmbeddedValkey, proxy: ValkeyProxy, tally: KillTally) -> None:
        self._directory = directory
        self._valkey = valkey
        self._proxy = proxy
        self._tally = tally
        self._rng = random.Random(tally.seed)
        self._names: Names = {}
        self._images: dict[str, NDArray[Any]] = {}
        self._steps: dict[str, int] = {}
        self._round = 0
        self._last_error = ""
        self._base = load_base_model(tiny_base_dir())
        self._cache = directory / "cache"
        settings = {
            "model": (tiny_base_dir(),),
            "redis_url": valkey.url.replace("valkey.sock", "proxy.sock"),
            "port": 0,
            "metrics_port": 0,
            "import_root": (directory / "imports",),
            "disk_cache_dir": self._cache,
            "gc_grace_s": 0.2,
            "gc_interval_s": 0.1,
        }
        self.store = ForkedStore(settings, directory / "store.log")

    async def run(self) -> None:
        """Run until there have been enough kills."""
        await asyncio.to_thread(self.store.start)
        for kind in KINDS:  # undisturbed: how many steps it takes
            call = make_call(kind, self._rng, self._names, self._directory)
            self._proxy.forget()
            await self._do(call)
            self._steps[kind] = max(4, self._proxy.num_steps)
        for number in range(self._tally.kills):
            self._round = number
            try:
                await self._kill_once()
                if self._round % DAMAGE_EVERY == DAMAGE_EVERY - 1:
                    await self._damage()
            except Exception as error:
                self._tally.wrong.append(f"round {self._round}: {type(error).__name__}: {error}"[:600])
                await self._start_all()
                self._names = await self._read_names()

    def _wrong(self, what: str) -> None:
        self._tally.wrong.append(f"round {self._round}: {what}")

    async def _start_all(self) -> None:
        self._proxy.forget()
        self._valkey.start()
        if not self.store.is_running:
            await asyncio.to_thread(self.store.start)

    async def _kill_once(self) -> None:
        call = make_call(self._rng.choice(KINDS), self._rng, self._names, self._directory)
        victim, is_after = self._rng.choice(("store", "valkey")), self._rng.random() < 0.5
        kill = self.store.kill if victim == "store" else self._valkey.kill
        self._proxy.arm(self._rng.randint(1, self._steps[call.kind] + 2), kill, after=is_after)
        before, after = dict(self._names), apply(self._names, call)
        is_answered = await self._try(call)
        self._proxy.happen()
        key = f"{victim} {call.kind} {'after' if is_after else 'before'}"
        self._tally.num_kills[key] = self._tally.num_kills.get(key, 0) + 1
        await self._start_all()
        now = await self._read_names()
        if now == after:
            self._tally.num_done += not is_answered
        elif is_answered:
            self._wrong(f"{call}: acknowledged, and lost with the {victim}: {now.get(call.name)}")
        elif now != before:
            self._wrong(f"{call}: half there after the {victim} was killed: {_difference(before, now)}")
        await self._do(call)
        if (now := await self._read_names()) != self._names:
            self._wrong(f"{call}: repeated, and not there: {_difference(self._names, now)}")
        await self._check_images(call)

    async def _try(self, call: Call) -> bool:
        """Make a call once; return whether it was answered."""
        try:
            async with asyncio.timeout(CALL_S), open_channel(self.store.target) as channel:
                await self._make(StoreClient(channel=channel), call)
        except (LoraplexError, grpc.aio.AioRpcError, TimeoutError, OSError) as error:
            self._last_error = f"{type(error).__name__}: {error}"
            return False
        self._names = apply(self._names, call)
        return True

    async def _do(self, call: Call) -> None:
        """Make a call, and repeat it while the parts come back."""
        give_up_at = time.monotonic() + CALL_S
        while not await self._try(call):
            if time.monotonic() > give_up_at:
                raise RuntimeError(f"{call} does not succeed: {self._last_error}")
            await asyncio.sleep(0.05)

    async def _make(self, client: StoreClient, call: Call) -> None:
        if call.kind == "attach":
            await self._image(client, call.digest)
        else:
            with translated():
                await call.make(client)

    async def _image(self, client: StoreClient, digest: str, *, flip: bool = False) -> None:
        """Take an image as an engine does, and compare it with the first that was taken of this revision."""
        geometry = self._base.geometry(dtype="float32", page_bytes=PAGE_BYTES)
        peer = EnginePeer(self._base, geometry, 512, f"engine-{self._rng.randrange(3)}")
        peer.accept_unsolicited = False
        peer.num_to_flip = int(flip)
        try:
            async with attached_peer(client.channel, self._base, peer=peer):
                peer.want(digest)
                image = await peer.image_or_refusal(digest)
        finally:
            peer.close()
        if (image != self._images.setdefault(digest, image)).any():
            self._wrong(f"the image of {digest} is another than before")
        self._tally.num_images += 1

    async def _check_images(self, call: Call) -> None:
        """Check the revisions of the name that was changed, and one of another."""
        another = self._rng.choice(sorted(self._names)) if self._names else call.name
        digests = self._of(call.name) | self._of(another)
        async with open_channel(self.store.target) as channel:
            client = StoreClient(channel=channel)
            for digest in sorted(digests):
                sha256 = hashlib.sha256()
                async for part in client.stub.DownloadAdapter(pb.DownloadAdapterRequest(revision=digest)):
                    sha256.update(part.data)
                if sha256.hexdigest() != digest:
                    self._wrong(f"the canonical form of {digest} has digest {sha256.hexdigest()}")
                await self._image(client, digest)

    def _of(self, name: str) -> set[str]:
        return set(self._names.get(name, {}).values())

    async def _read_names(self) -> Names:
        """Return what a gateway is told; waits until the store follows Valkey again."""
        give_up_at = time.monotonic() + CALL_S
        while True:
            try:
                async with open_channel(self.store.target) as channel:
                    listed = await self._position(StoreClient(channel=channel))
                    watch = StoreClient(channel=channel).stub.WatchAliases(pb.WatchAliasesRequest())
                    found: Names = {}
                    while True:
                        part = await asyncio.wait_for(watch.read(), 5.0)
                        for entry in part.entries:
                            if not entry.deleted and entry.aliases:
                                found[entry.name] = {alias.label: alias.revision for alias in entry.aliases}
                        if part.snapshot_end:
                            break
                    watch.cancel()
                    if part.sequence >= listed:
                        return found
            except (grpc.aio.AioRpcError, TimeoutError, LoraplexError) as error:
                if time.monotonic() > give_up_at:
                    raise RuntimeError(f"names cannot be read: {error}") from error
            await asyncio.sleep(0.05)

    async def _position(self, client: StoreClient) -> int:
        valkey = connect(self._valkey.url)
        try:
            return int(await valkey.get("loraplex:store:{names}:sequence") or 0)
        finally:
            await valkey.aclose()

    async def _damage(self) -> None:
        """Do something that kills nothing, and put it right again."""
        if not self._names:
            return
        kind = self._rng.choice(("full", "chunk", "disk", "arena"))
        self._tally.num_damages[kind] = self._tally.num_damages.get(kind, 0) + 1
        digest = self._rng.choice(sorted({digest for name in self._names for digest in self._of(name)}))
        valkey = connect(self._valkey.url)
        try:
            async with open_channel(self.store.target) as channel:
                client = StoreClient(channel=channel)
                if kind == "arena":
                    await self._image(client, digest, flip=True)
                elif kind == "full":
                    await self._fill(client, valkey)
            if kind in ("chunk", "disk"):
                await self._flip(kind, digest, valkey)
        finally:
            await valkey.config_set("maxmemory", 0)
            await valkey.aclose()
        if (now := await self._read_names()) != self._names:
            self._wrong(f"{kind}: {_difference(self._names, now)}")

    async def _fill(self, client: StoreClient, valkey: Any) -> None:
        """Import into a Valkey without memory: refused by name, and done once there is some."""
        call = make_call("upload", self._rng, self._names, self._directory)
        await valkey.config_set("maxmemory", 1)
        try:
            with translated():
                await call.make(client)
            self._wrong(f"{call} was answered by a full Valkey")
        except SaturatedError:
            pass
        await valkey.config_set("maxmemory", 0)
        await self._do(call)
        await self._check_images(call)

    async def _flip(self, kind: str, digest: str, valkey: Any) -> None:
        """Flip a bit of what a store that starts reads first: a chunk, which is refused, or a file, which is made anew."""
        self.store.kill()
        files = sorted(path for path in self._cache.glob(f"{digest}*") if path.stat().st_size)
        key = f"a:{{{digest}}}:c:0"
        if kind == "chunk":
            for path in files:
                path.unlink()
            await valkey.set(key, _flipped(await valkey.get(key), self._rng))
        elif files:
            path = self._rng.choice(files)
            path.write_bytes(_flipped(path.read_bytes(), self._rng))
        await asyncio.to_thread(self.store.start)
        async with open_channel(self.store.target) as channel:
            client = StoreClient(channel=channel)
            if kind == "chunk":
                try:
                    await self._image(client, digest)
                    self._wrong(f"an image of {digest} came from a damaged chunk")
                except AdapterCorruptError:
                    pass
                await self._do(import_again(next(name for name in self._names if digest in self._of(name)), digest))
            await self._image(client, digest)


def _flipped(data: bytes, rng: random.Random) -> bytes:
    position = rng.randrange(len(data))
    return data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :]


def _difference(expected: Names, found: Names) -> str:
    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return "; ".join(f"{name}: {expected.get(name)} expected, {found.get(name)} found" for name in names)


async def _run(directory: Path, valkey: EmbeddedValkey, tally: KillTally) -> None:
    (directory / "imports").mkdir()
    socket = valkey.address.removeprefix("unix://")
    async with ValkeyProxy(Path(socket).with_name("proxy.sock"), socket) as proxy:
        campaign = _Campaign(directory, valkey, proxy, tally)
        try:
            await campaign.run()
        finally:
            campaign.store.kill()


def run_kill_campaign(directory: Path, *, kills: int, seed: int) -> KillTally:
    """Run a campaign in an empty directory; the tally has what was wrong."""
    tally, began = KillTally(seed=seed, kills=kills), time.monotonic()
    with EmbeddedValkey(directory / "v", max_memory_bytes=2**30) as valkey:
        asyncio.run(_run(directory, valkey, tally))
    tally.seconds = round(time.monotonic() - began, 1)
    return tally


def main() -> None:
    """Run a campaign and print its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="where to write what came of it")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="loraplex-kills-") as directory:
        tally = run_kill_campaign(Path(directory), kills=options.kills, seed=options.seed)
    text = json.dumps({"commit": commit, **asdict(tally)}, indent=2)
    print(text)
    if options.results is not None:
        (options.results / f"store-kills_{commit[:12]}_{options.seed}.json").write_text(text + "\n")
    sys.exit(bool(tally.wrong))


if __name__ == "__main__":
    main()
