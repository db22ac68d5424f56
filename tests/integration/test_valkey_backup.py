"""The backup and the restore of Valkey, by the commands that docs/operating.md has."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import redis
from loraplex_common.valkey import EmbeddedValkey
from support.documents import ROOT, marked_blocks

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration

HERE = "tests/integration/test_valkey_backup.py"
# No Python package has valkey-cli: the same commands to the same server, answers printed as valkey-cli prints them.
CLI = """#!{python}
import sys, redis
answer = redis.Redis.from_url({url!r}).execute_command(*sys.argv[1:])
if isinstance(answer, dict):
    print("\\n".join(f"{{key}}:{{value}}" for key, value in answer.items()))
else:
    print(answer)
"""


class Operator:
    """A shell in Valkey's data directory, with a valkey-cli that reaches the server."""

    def __init__(self, tmp_path: Path, server: EmbeddedValkey, data_dir: Path) -> None:
        cli = tmp_path / "bin" / "valkey-cli"
        cli.parent.mkdir()
        cli.write_text(CLI.format(python=sys.executable, url=server.url))
        cli.chmod(cli.stat().st_mode | stat.S_IXUSR)
        self._environment = {**os.environ, "PATH": f"{cli.parent}:{os.environ['PATH']}"}
        self._data_dir = data_dir

    def types(self, commands: tuple[str, ...]) -> None:
        """Run commands in Valkey's data directory, and stop at the first that fails."""
        script = "set -e\n" + "\n".join(commands)
        command = ["bash", "-c", script]
        done = subprocess.run(
            command, cwd=self._data_dir, env=self._environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("is_rewriting", [False, True])
def test_what_was_backed_up_is_there_after_the_restore(tmp_path: Path, *, is_rewriting: bool) -> None:
    backup, restore = (
        block.commands for block in marked_blocks(ROOT / "docs" / "operating.md") if HERE in block.runners
    )
    with EmbeddedValkey(tmp_path / "data") as server:
        operator = Operator(tmp_path, server, tmp_path / "data")
        client = redis.Redis.from_url(server.url)
        client.mset({f"kept:{number}": "x" * 4096 for number in range(2000)})
        if is_rewriting:
            client.bgrewriteaof()
        operator.types(backup)
        client.set("later", "1")
        client.delete("kept:0")
        client.close()
        server.stop()

        operator.types(restore)
        server.start()

        client = redis.Redis.from_url(server.url)
        assert len(client.keys("kept:*")) == 2000
        assert client.get("kept:0") == b"x" * 4096
        assert client.get("later") is None
        assert client.config_get("auto-aof-rewrite-percentage") == {"auto-aof-rewrite-percentage": "100"}
        client.close()
