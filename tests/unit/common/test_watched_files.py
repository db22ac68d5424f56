"""Files that change while we run: taken in once they are sound, and never given up for what is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from loraplex_common.secret import Secret, SecretFileError
from structlog.testing import capture_logs
from support.certificates import write

if TYPE_CHECKING:
    from pathlib import Path


class Clock:
    """Time as a test wants it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 10.0  # every look counts
        return self.now


def test_a_secret_is_read_again_when_its_file_changes_even_by_a_moved_link(tmp_path: Path) -> None:
    first, second, link = tmp_path / "first", tmp_path / "second", tmp_path / "secret"
    first.write_text("one\n")
    second.write_text("two\n")
    link.symlink_to(first)
    secret = Secret.from_file(link, clock=Clock())
    before = secret.reveal()

    link.unlink()
    link.symlink_to(second)

    assert (before, secret.reveal()) == ("one", "two")


@pytest.mark.parametrize("text", ["", "two\nlines\n", None], ids=["empty", "two lines", "gone"])
def test_a_broken_file_is_logged_once_and_the_old_secret_stays_good(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "secret"
    file.write_text("hunter2\n")
    secret = Secret.from_file(file, clock=Clock())

    with capture_logs() as logs:
        if text is None:
            file.unlink()
        else:
            write(file, text)
        found = {secret.reveal() for _ in range(5)}
        write(file, "hunter3\n")
        mended = secret.reveal()

    assert (found, mended) == ({"hunter2"}, "hunter3")
    assert [log["log_level"] for log in logs] == ["error", "info"]
    assert "hunter" not in str(logs)


def test_a_secret_shows_itself_to_nobody(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("hunter2\n")

    for secret in (Secret("hunter2"), Secret.from_file(file)):
        assert "hunter2" not in f"{secret} {secret!r}"


def test_a_file_without_a_secret_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("\n\n")

    with pytest.raises(SecretFileError, match="one line"):
        Secret.from_file(tmp_path / "key")
