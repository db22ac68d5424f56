from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import loraplex_client
import pytest

SCRIPT = Path(__file__).parents[3] / "clients/python/generate_sync.py"


def load_generator() -> Any:
    """Return the generator, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("generate_sync", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def to_sync(source: str) -> str:
    text = load_generator().to_sync(source, set())
    assert isinstance(text, str)
    return text


def test_the_blocking_client_is_generated_from_the_asyncio_one_as_it_is_now() -> None:
    result = subprocess.run(
        [sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False, timeout=120
    )

    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("async def f():\n    await g()\n", "def f():\n    g()\n"),
        ("async with a as b, c:\n    pass\n", "with a as b, c:\n    pass\n"),
        ("class AsyncThings(AsyncIterator[Event]): ...\n", "class Things(Iterator[Event]): ...\n"),
        ("call: Callable[[S], Awaitable[dict[str, T]]]\n", "call: Callable[[S], dict[str, T]]\n"),
        ("def __aenter__(self): ...\n", "def __enter__(self): ...\n"),
        ("raise StopAsyncIteration\n", "raise StopIteration\n"),
        ("channel: grpc.aio.Channel\n", "channel: grpc.Channel\n"),
        ("from loraplex_client._aio.stream import Flag\n", "from loraplex_client._sync.stream import Flag\n"),
        ('S = "ThingAsyncStub"  # made by `AsyncClient`\n', 'S = "ThingStub"  # made by `Client`\n'),
    ],
)
def test_each_form_of_asyncio_has_its_blocking_form(source: str, expected: str) -> None:
    assert to_sync(source) == expected


@pytest.mark.parametrize("source", ["import asyncio\n", "x = 1  # waits as asyncio does\n", 'S = "await it"\n'])
def test_what_is_left_of_asyncio_is_refused_with_its_line(source: str) -> None:
    with pytest.raises(ValueError, match="is left in line 2"):
        to_sync("y = 2\n" + source)


def test_a_changed_a_missing_and_a_strange_file_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = load_generator()
    monkeypatch.setattr(generator, "TARGET", tmp_path)
    for name in ("same.py", "changed.py", "strange.py", "waiting.py"):
        (tmp_path / name).write_text("x = 1\n")

    stale = generator._stale({"same.py": "x = 1\n", "changed.py": "x = 2\n", "missing.py": "x = 3\n"})

    assert stale == ["changed.py", "missing.py", "strange.py"]


def test_both_clients_offer_the_same_calls_with_the_same_arguments() -> None:
    pairs = [
        (loraplex_client.Client, loraplex_client.AsyncClient),
        (loraplex_client.Adapters, loraplex_client.AsyncAdapters),
        (loraplex_client.GenerateStream, loraplex_client.AsyncGenerateStream),
    ]
    for blocking, asynchronous in pairs:
        names = {"aclose": "close"}
        calls = {name: call for name, call in vars(blocking).items() if inspect.isfunction(call) and name[0] != "_"}
        others = {
            names.get(name, name): call
            for name, call in vars(asynchronous).items()
            if inspect.isfunction(call) and name[0] != "_"
        }
        assert calls.keys() == others.keys()
        for name, call in calls.items():
            assert inspect.signature(call).parameters == inspect.signature(others[name]).parameters
