"""The embedded Valkey keeps what it acknowledged, and never outlives its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
from loraplex_common import valkey
from loraplex_common.errors import StoreUnavailableError
from loraplex_common.valkey import EmbeddedValkey, ValkeyError, connect, server_binary

DEADLINE_S = 20.0


def client_of(server: EmbeddedValkey) -> redis.Redis:
    return redis.Redis.from_url(server.url)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.01)


def test_a_killed_server_comes_back_with_all_acknowledged_data(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server:
        url = server.url
        with client_of(server) as client:
            for number in range(100):
                client.set(f"key:{number}", os.urandom(1000))
            assert client.execute_command("WAITAOF", 1, 0, 5000)[0] == 1
            expected = client.get("key:99")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        deadline = time.monotonic() + DEADLINE_S
        while server.is_running:
            assert time.monotonic() < deadline
            time.sleep(0.01)

        server.start()

        assert server.url == url
        with client_of(server) as client:
            assert client.dbsize() == 100
            assert client.get("key:99") == expected


def test_data_outlives_a_clean_stop_and_another_owner_finds_it(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as first, client_of(first) as client:
        client.set("a", b"1")

    with EmbeddedValkey(tmp_path) as second, client_of(second) as client:
        assert client.get("a") == b"1"


def test_it_never_evicts_and_appends_to_a_file(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path, max_memory_bytes=2**26) as server, client_of(server) as client:
        config = client.config_get("*")

    assert config["maxmemory-policy"] == "noeviction"
    assert config["maxmemory"] == str(2**26)
    assert (config["appendonly"], config["appendfsync"]) == ("yes", "everysec")
    assert "Ready to accept connections" in server.log_path.read_text()


def test_a_data_directory_has_one_server_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(valkey, "LOCK_TIMEOUT_S", 0.1)

    with EmbeddedValkey(tmp_path), pytest.raises(ValkeyError, match="in use by another process"):
        EmbeddedValkey(tmp_path).start()


def test_one_refused_for_a_data_directory_in_use_leaves_the_socket_of_the_one_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(valkey, "LOCK_TIMEOUT_S", 0.1)

    with EmbeddedValkey(tmp_path) as server:
        refused = EmbeddedValkey(tmp_path)
        with pytest.raises(ValkeyError, match="in use by another process"):
            refused.start()
        refused.close()

        with client_of(server) as client:
            assert client.ping()


def test_a_long_and_odd_data_path_still_gets_a_socket(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / ('long "\\ü' * 20)) as server, client_of(server) as client:
        assert client.ping()
    assert not Path(server.address.removeprefix("unix://")).exists()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    aof = tmp_path / "appendonlydir"
    aof.mkdir()
    (aof / "appendonly.aof.manifest").write_text("garbage\n")

    server = EmbeddedValkey(tmp_path)
    with pytest.raises(ValkeyError, match=r"ended with 1: .*[Mm]anifest"):
        server.start()
    assert not server.is_running


def test_stopping_twice_is_harmless(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    server.start()
    server.stop()
    server.stop()
    server.close()
    assert not server.is_running


OWNER = """
import sys, time
from pathlib import Path
from loraplex_common.errors import StoreUnavailableError
from loraplex_common.valkey import EmbeddedValkey
server = EmbeddedValkey(Path(sys.argv[1]))
server.start()
print(server.pid, server.url, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_the_server_dies_with_its_killed_owner_and_the_next_owner_has_the_data(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        pid, url = owner.stdout.readline().split()
        with redis.Redis.from_url(url) as client:
            client.set("a", b"1")
            assert client.execute_command("WAITAOF", 1, 0, 5000)[0] == 1
    finally:
        owner.kill()
        owner.communicate()

    wait_until_gone(int(pid))
    with EmbeddedValkey(tmp_path) as server, client_of(server) as client:
        assert client.get("a") == b"1"


async def test_connect_answers_in_bytes_and_survives_a_restart(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server:
        client = connect(server.url)
        await client.set("a", "1")
        server.stop()
        server.start()

        assert await client.get("a") == b"1"
        await client.aclose()


async def test_connect_fails_within_seconds_where_nobody_answers(tmp_path: Path) -> None:
    client = connect(f"unix://{tmp_path}/nobody.sock")
    started = time.monotonic()

    with pytest.raises(StoreUnavailableError):
        await client.ping()
    assert time.monotonic() - started < 5
    await client.aclose()


def test_each_test_gets_an_empty_database(valkey_url: str) -> None:
    with redis.Redis.from_url(valkey_url) as client:
        assert client.dbsize() == 0
        client.set("left behind", 1)


@pytest.mark.parametrize("_again", range(2))
def test_each_test_gets_an_empty_database_again(valkey_url: str, _again: int) -> None:
    with redis.Redis.from_url(valkey_url) as client:
        assert client.dbsize() == 0
        client.set("left behind", 1)


def test_the_binary_is_a_valkey_or_redis_server() -> None:
    version = subprocess.run([server_binary(), "--version"], capture_output=True, text=True, check=True).stdout

    assert "server" in version.lower()
