"""A weight file is hashed once per machine, and never taken for the file it was before."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from loraplex_common.base_model import BaseModelError
from loraplex_common.weight_digests import WeightDigests

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_common.weight_digests import FileState

CONTENT = bytes(range(256)) * 100


class Counting(WeightDigests):
    """Counts the files that it really hashes."""

    def __init__(self, folder: Path | None, *, min_kept_bytes: int = 0, settled_s: float = 0.0) -> None:
        super().__init__(folder, min_kept_bytes=min_kept_bytes, settled_s=settled_s)
        self.num_hashed = 0

    def _hash(self, path: Path) -> tuple[FileState, str]:
        self.num_hashed += 1
        return super()._hash(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    return path


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_digest_is_the_hub_s_and_is_computed_once(tmp_path: Path, file: Path) -> None:
    first, second = Counting(tmp_path / "cache"), Counting(tmp_path / "cache")

    assert first.of([file]) == second.of([file]) == {file: digest_of(CONTENT)}
    assert (first.num_hashed, second.num_hashed) == (1, 0)


def test_links_to_one_file_share_its_digest(tmp_path: Path, file: Path) -> None:
    digests, link = Counting(tmp_path / "cache"), tmp_path / "snapshot.safetensors"
    link.symlink_to(file)

    assert digests.of([file]) | digests.of([link]) == dict.fromkeys((file, link), digest_of(CONTENT))
    assert digests.num_hashed == 1


def test_a_file_rewritten_in_place_with_its_old_time_is_hashed_again(tmp_path: Path, file: Path) -> None:
    digests, status, other = Counting(tmp_path / "cache"), file.stat(), CONTENT[::-1]
    digests.of([file])

    with file.open("r+b") as opened:
        opened.write(other)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    assert digests.of([file]) == {file: digest_of(other)}


def test_a_file_replaced_by_another_of_its_size_and_time_is_hashed_again(tmp_path: Path, file: Path) -> None:
    digests, status, other = Counting(tmp_path / "cache"), file.stat(), tmp_path / "other"
    digests.of([file])

    other.write_bytes(CONTENT[::-1])
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)

    assert digests.of([file]) == {file: digest_of(CONTENT[::-1])}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sha256": "ab"}', "null", "\x00\xff"])
def test_a_broken_entry_is_ignored_and_written_anew(tmp_path: Path, file: Path, text: str) -> None:
    digests = Counting(tmp_path / "cache")
    digests.of([file])
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_text(text)

    assert digests.of([file]) == digests.of([file]) == {file: digest_of(CONTENT)}
    assert digests.num_hashed == 2


def test_a_file_just_written_is_not_kept_as_it_may_change_within_the_clock_s_tick(tmp_path: Path, file: Path) -> None:
    digests = Counting(tmp_path / "cache", settled_s=60.0)

    assert digests.of([file]) == digests.of([file]) == {file: digest_of(CONTENT)}
    assert digests.num_hashed == 2


def test_small_files_leave_nothing_behind(tmp_path: Path, file: Path) -> None:
    WeightDigests(tmp_path / "cache", settled_s=0.0).of([file])

    assert not (tmp_path / "cache").exists()


def test_without_a_place_for_digests_files_are_hashed_all_the_same(tmp_path: Path, file: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder would be")

    for digests in (Counting(None), Counting(tmp_path / "taken"), Counting(tmp_path / "taken" / "below")):
        assert digests.of([file]) == {file: digest_of(CONTENT)}


def test_a_read_only_model_directory_is_as_good(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "a.safetensors").write_bytes(CONTENT)
    model.chmod(0o555)

    Counting(tmp_path / "cache").of([model / "a.safetensors"])

    assert [path.name for path in model.iterdir()] == ["a.safetensors"]


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown = iter((False, True))

    def fstat(descriptor: int) -> os.stat_result:
        if next(grown, False):
            with file.open("ab") as opened:
                opened.write(b"more")
        return os.stat(descriptor)

    monkeypatch.setattr("os.fstat", fstat)

    with pytest.raises(BaseModelError, match="changed while it was read"):
        Counting(None).of([file])


def test_a_missing_shard_ends_the_others_too(tmp_path: Path, file: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        Counting(tmp_path / "cache").of([file, tmp_path / "gone"])


HASH = """
import sys, time
from pathlib import Path
from loraplex_common.weight_digests import WeightDigests
started, hashed = Path(sys.argv[3]), Path(sys.argv[4])
class Slow(WeightDigests):
    def _hash(self, path):
        while len(started.read_text()) < 3:  # all of them want the digest before the first has it
            time.sleep(0.01)
        hashed.open("a").write("x")
        return super()._hash(path)
started.open("a").write("x")
print(Slow(Path(sys.argv[1]), min_kept_bytes=0, settled_s=0.0).of([Path(sys.argv[2])]).popitem()[1])
"""


def test_of_processes_that_start_together_one_hashes(tmp_path: Path, file: Path) -> None:
    started, hashed = tmp_path / "started", tmp_path / "hashed"
    command = [sys.executable, "-c", HASH, *map(str, (tmp_path / "cache", file, started, hashed))]

    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {child.communicate(timeout=60)[0].splitlines()[-1] for child in children}

    assert printed == {digest_of(CONTENT)}
    assert hashed.read_text() == "x"
