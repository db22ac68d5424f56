"""The store's disk tier: a restart is warm, and nothing that lies on a disk is believed unchecked."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from loraplex_adapter_store.disk.cache_file import MAGIC, CacheFile
from loraplex_adapter_store.disk.disk_index import DiskIndex
from loraplex_common.base_model import BaseModelInfo, load_base_model
from loraplex_common.valkey import connect
from support.adapters import Recipe
from support.store_engine_peer import EnginePeer, attached_peer
from support.store_rig import StoreClient, delete, running_rig, store_config, tiny_base_dir
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

pytestmark = pytest.mark.integration
PAGE_BYTES = 64 * 1024


class Stored(NamedTuple):
    """An adapter whose image a store has derived, and written to its disk before it ended."""

    digest: str
    image: NDArray[np.uint8]
    config: Any

    def file(self, kind: str) -> Path:
        path: Path
        (path,) = self.config.disk_cache_dir.glob(f"{self.digest}*.{kind}")
        return path


def kinds(directory: Path) -> list[str]:
    return sorted(path.suffix for path in directory.iterdir() if path.name != "lock")


def has_images(directory: Path, count: int) -> bool:
    return kinds(directory).count(".image") == count


def bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def revisions(directory: Path) -> set[str]:
    return {path.name[:64] for path in directory.iterdir() if path.suffix in (".image", ".canonical")}


async def fetch(client: StoreClient, base: BaseModelInfo, digest: str) -> NDArray[np.uint8]:
    peer = EnginePeer(base, base.geometry(dtype="float32", page_bytes=PAGE_BYTES), 256, "engine-test")
    peer.accept_unsolicited = False
    async with attached_peer(client.channel, base, peer=peer):
        peer.want(digest)
        image = await peer.image(digest)
    peer.close()
    return image


@pytest.fixture(scope="module")
def base() -> BaseModelInfo:
    return load_base_model(tiny_base_dir())


@pytest.fixture
async def stored(redis_url: str, base: BaseModelInfo, tmp_path: Path) -> Stored:
    config = store_config(redis_url, disk_cache_dir=tmp_path / "cache")
    async with running_rig(config) as (_, client):
        digest = (await client.upload_recipe("a")).revision.revision
        image = await fetch(client, base, digest)
        await eventually(lambda: kinds(tmp_path / "cache") == [".canonical", ".image"])
    return Stored(digest, image, config)


async def lose_weights(stored: Stored) -> None:
    client = connect(stored.config.redis_url)
    await client.delete(f"a:{{{stored.digest}}}:c:0")
    await client.aclose()


async def test_a_restarted_store_has_its_images_without_valkeys_chunks(stored: Stored, base: BaseModelInfo) -> None:
    await lose_weights(stored)

    async with running_rig(stored.config) as (_, client):
        np.testing.assert_array_equal(await fetch(client, base, stored.digest), stored.image)


async def test_an_image_of_another_geometry_is_derived_from_the_canonical_form_on_disk(
    stored: Stored, base: BaseModelInfo
) -> None:
    await lose_weights(stored)

    async with (
        running_rig(stored.config) as (_, client),
        attached_peer(client.channel, base, page_bytes=2 * PAGE_BYTES) as peer,
    ):
        peer.want(stored.digest)
        assert (await peer.image(stored.digest)).shape[1] == 2 * PAGE_BYTES


async def test_a_restarted_store_fills_the_idle_room_of_an_engine_from_its_disk(
    stored: Stored, base: BaseModelInfo
) -> None:
    async with (
        running_rig(stored.config) as (_, client),
        attached_peer(client.channel, base, page_bytes=PAGE_BYTES) as peer,
    ):
        np.testing.assert_array_equal(await peer.image(stored.digest), stored.image)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit in the body": lambda path: flip(path, -1),
    "a flipped bit in the header": lambda path: flip(path, 60),
    "another version": lambda path: flip(path, 3),
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_file_is_named_deleted_and_made_anew(
    stored: Stored, base: BaseModelInfo, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stored.file("image")
    async with running_rig(stored.config) as (_, client):
        DAMAGE[damage](path)
        capsys.readouterr()

        np.testing.assert_array_equal(await fetch(client, base, stored.digest), stored.image)

        said = capsys.readouterr().out
        assert "damaged and deleted" in said
        assert path.name in said
        await eventually(lambda: path.exists() and path.stat().st_size > stored.image.nbytes)


@pytest.mark.parametrize("size", [0, 1, -4096])
async def test_a_file_that_is_cut_after_its_check_is_made_anew(stored: Stored, base: BaseModelInfo, size: int) -> None:
    path = stored.file("image")
    config = replace(stored.config, image_cache_bytes=1)  # so that each engine's image comes from the disk
    async with running_rig(config) as (_, client):
        await fetch(client, base, stored.digest)
        os.truncate(path, size % path.stat().st_size)

        np.testing.assert_array_equal(await fetch(client, base, stored.digest), stored.image)

        await eventually(lambda: path.exists() and path.stat().st_size > stored.image.nbytes)


OTHER_HEADERS: dict[str, Any] = {
    "a spec of a later version": {"fields": {"spec": '{"digest": "x", "modules": [{"parts": {"later": {}}}]}'}},
    "no spec": {"fields": {"spec": None}},
    "no fields": {"fields": None},
    "pages of no bytes": {"shape": [2**40, 0]},
    "no shape": {"shape": None},
    "digests that are none": {"pieces": 7},
}


@pytest.mark.parametrize("change", OTHER_HEADERS)
async def test_a_whole_header_of_another_writer_is_no_image(stored: Stored, base: BaseModelInfo, change: str) -> None:
    path, start = stored.file("image"), len(MAGIC) + 4
    data = path.read_bytes()
    (length,) = struct.unpack_from("<I", data, len(MAGIC))
    header = json.loads(data[start : start + length])
    other = dict(OTHER_HEADERS[change])
    if other.get("fields"):
        other["fields"] = header["fields"] | other["fields"]
    text = json.dumps(header | other).encode()
    head = MAGIC + struct.pack("<I", len(text)) + text + hashlib.sha256(text).digest()
    path.write_bytes(head + bytes(-len(head) % 4096) + data[-stored.image.nbytes :])

    async with running_rig(stored.config) as (_, client):
        np.testing.assert_array_equal(await fetch(client, base, stored.digest), stored.image)


async def test_budgets_of_one_byte_cost_time_only(redis_url: str, base: BaseModelInfo, tmp_path: Path) -> None:
    config = store_config(
        redis_url, disk_cache_dir=tmp_path, disk_cache_bytes=1, image_cache_bytes=1, image_work_bytes=1
    )
    async with running_rig(config) as (_, client):
        digest = (await client.upload_recipe("a")).revision.revision
        np.testing.assert_array_equal(await fetch(client, base, digest), await fetch(client, base, digest))

    assert kinds(tmp_path) == []


@pytest.mark.parametrize("num_gone", [1, 2])
async def test_a_file_that_is_deleted_while_it_is_opened_costs_no_image(
    stored: Stored, base: BaseModelInfo, monkeypatch: pytest.MonkeyPatch, num_gone: int
) -> None:
    body = CacheFile.body
    gone: list[Path] = []

    def vanish(file: CacheFile) -> NDArray[np.uint8]:
        if len(gone) < num_gone:
            gone.append(file.path)
            file.path.unlink(missing_ok=True)
        return body(file)

    monkeypatch.setattr(CacheFile, "body", vanish)
    async with running_rig(stored.config) as (_, client):
        assert (await fetch(client, base, stored.digest) == stored.image).all()
    assert len(gone) == num_gone


async def test_a_damaged_canonical_form_is_read_from_valkey(stored: Stored, base: BaseModelInfo) -> None:
    stored.file("image").unlink()
    flip(stored.file("canonical"), -1)
    async with running_rig(stored.config) as (_, client):
        np.testing.assert_array_equal(await fetch(client, base, stored.digest), stored.image)


async def test_a_full_disk_costs_no_image_and_leaves_nothing(
    redis_url: str, base: BaseModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("loraplex_adapter_store.disk.cache_file.os.fsync", full)
    async with running_rig(store_config(redis_url, disk_cache_dir=tmp_path)) as (_, client):
        digest = (await client.upload_recipe("a")).revision.revision
        await fetch(client, base, digest)
        await eventually(lambda: "No space left on device" in capsys.readouterr().out)
    assert kinds(tmp_path) == []


async def test_the_least_recently_used_files_make_room_also_after_a_restart(
    redis_url: str, base: BaseModelInfo, tmp_path: Path
) -> None:
    async with running_rig(store_config(redis_url, disk_cache_dir=tmp_path)) as (_, client):
        digests = [(await client.upload_recipe("a", Recipe(seed=seed))).revision.revision for seed in range(3)]
        for number, digest in enumerate(digests):
            await fetch(client, base, digest)
            await eventually(partial(has_images, tmp_path, number + 1))
    total = bytes_of(tmp_path)
    (tmp_path / "dead.image.0123.part").write_bytes(b"of a writer that was killed")

    async with running_rig(store_config(redis_url, disk_cache_dir=tmp_path, disk_cache_bytes=total // 2)):
        left = revisions(tmp_path)

    assert digests[0] not in left
    assert digests[2] in left
    assert ".part" not in kinds(tmp_path)


async def test_an_imported_adapters_image_is_made_for_the_attached_engines_before_it_is_wanted(
    redis_url: str, base: BaseModelInfo, tmp_path: Path
) -> None:
    config = store_config(redis_url, disk_cache_dir=tmp_path)
    async with running_rig(config) as (_, client), attached_peer(client.channel, base) as peer:
        await client.upload_recipe("a")

        await eventually(lambda: kinds(tmp_path) == [".canonical", ".image"])
        assert "offer" not in peer.kinds()


async def test_no_image_is_made_ahead_if_the_flag_says_so(redis_url: str, base: BaseModelInfo, tmp_path: Path) -> None:
    config = store_config(redis_url, disk_cache_dir=tmp_path, prepare_images=0)
    async with running_rig(config) as (_, client), attached_peer(client.channel, base) as peer:
        await client.upload_recipe("a")
        second = (await client.upload_recipe("b", Recipe(seed=1))).revision.revision
        peer.want(second)
        await peer.image(second)
        await eventually(lambda: kinds(tmp_path) == [".canonical", ".image"])

    assert revisions(tmp_path) == {second}


async def test_a_directory_that_another_store_uses_is_refused_by_name(stored: Stored) -> None:
    async with running_rig(stored.config):
        with pytest.raises(ValueError, match=r"--disk-cache-dir .*cache is used by another adapter store"):
            async with running_rig(stored.config):
                pass


def test_a_service_ends_with_that_name_and_no_traceback(redis_url: str, tmp_path: Path) -> None:
    holder = DiskIndex(tmp_path, 1)
    arguments = ["--model", str(tiny_base_dir()), "--disk-cache-dir", str(tmp_path)]
    environment = {**os.environ, "LORAPLEX_ADAPTER_STORE_REDIS_URL": redis_url}
    command = [sys.executable, "-m", "loraplex_adapter_store", "--port", "0", "--metrics-port", "0", *arguments]

    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert holder.directory == tmp_path
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        f"loraplex-adapter-store: --disk-cache-dir {tmp_path} is used by another adapter store: give each its own"
    )
    assert "Traceback" not in ended.stderr


async def test_the_files_of_a_deleted_adapter_go_with_it(stored: Stored) -> None:
    async with running_rig(stored.config) as (_, client):
        await delete(client, "a")
        await eventually(lambda: kinds(stored.config.disk_cache_dir) == [])
