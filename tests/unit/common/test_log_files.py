"""Logs of children: bounded, complete, readable after the child's end."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from loraplex_common import log_files
from loraplex_common.log_files import KEPT_BYTES, NUM_OLD_FILES, RotatingLog

if TYPE_CHECKING:
    from pathlib import Path

LINE_BYTES = 20


def run_child(log: RotatingLog, script: str) -> None:
    pipe = log.pipe()
    try:
        subprocess.run([sys.executable, "-c", script], stderr=pipe, check=False)
    finally:
        os.close(pipe)
    log.drain()


def print_lines(count: int) -> str:
    return f"import sys; [print(f'line {{i:013}}', file=sys.stderr) for i in range({count})]"


def test_what_a_child_prints_is_in_the_file_once_it_has_ended(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "engine.log")

    run_child(log, "import os; os.write(2, b'dying words'); os.abort()")

    assert log.tail(1) == "dying words"
    assert [path.name for path in tmp_path.iterdir()] == ["engine.log"]


def test_a_log_file_that_is_full_is_followed_by_a_new_one_and_no_line_is_lost_or_cut(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "engine.log", max_file_bytes=10 * LINE_BYTES)

    run_child(log, print_lines(35))

    names = [f"engine.log{suffix}" for suffix in (".3", ".2", ".1", "")]
    lines = [line for name in names for line in (tmp_path / name).read_text().splitlines()]
    assert lines == [f"line {i:013}" for i in range(35)]
    assert {(tmp_path / name).stat().st_size for name in names[:3]} == {10 * 19 + 19}


def test_all_log_files_of_a_child_that_never_stops_stay_bounded(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "engine.log", max_file_bytes=1000)

    for _ in range(2):  # restarted, too
        run_child(log, print_lines(2000))

    files = list(tmp_path.iterdir())
    assert len(files) == 1 + NUM_OLD_FILES
    assert max(file.stat().st_size for file in files) <= 1000 + LINE_BYTES
    assert log.tail(2).splitlines() == ["line 0000000001998", "line 0000000001999"]


def test_a_child_that_prints_no_lines_is_bounded_too(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "engine.log", max_file_bytes=100_000)

    run_child(log, "import os; [os.write(2, b'.' * 10_000) for _ in range(100)]")

    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= (1 + NUM_OLD_FILES) * (200_000 + 65_536)


@pytest.mark.parametrize("num_lines", [3, 12])
def test_the_tail_goes_back_into_the_file_before(tmp_path: Path, num_lines: int) -> None:
    log = RotatingLog(tmp_path / "engine.log", max_file_bytes=10 * 19)
    run_child(log, print_lines(12))

    assert log.tail(num_lines).splitlines() == [f"line {i:013}" for i in range(12)][-num_lines:]


def test_logs_leave_the_last_of_the_disk_to_the_adapters_and_go_on_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RotatingLog(tmp_path / "engine.log")
    run_child(log, print_lines(1))
    size = log.path.stat().st_size
    monkeypatch.setattr(log_files, "_has_room", lambda directory: False)

    run_child(log, print_lines(10_000))

    assert log.path.stat().st_size == size
    assert log.tail(1) == f"line {9999:013}"

    monkeypatch.setattr(log_files, "_has_room", lambda directory: True)
    run_child(log, "print('room', file=__import__('sys').stderr)")

    lines = log.path.read_text().splitlines()
    assert lines[1] == f"... {10_000 * 19 - KEPT_BYTES} bytes of log are lost: the disk had no room"
    assert lines[-2:] == [f"line {9999:013}", "room"]


def test_a_child_goes_on_while_its_log_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "engine.log").symlink_to("/dev/full")
    log = RotatingLog(tmp_path / "engine.log")

    run_child(log, print_lines(10_000) + f"; open({str(tmp_path / 'done')!r}, 'w')")

    assert (tmp_path / "done").exists()
    assert log._unwritten.endswith(b"9999\n")
