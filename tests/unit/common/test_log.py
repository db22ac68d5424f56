"""Logs of our own and of libraries: one line each, on stderr, without local variables."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
from loraplex_common import log


def run(code: str) -> tuple[str, list[str]]:
    """Run a program that logs; return its stdout and its lines on stderr."""
    source = "import logging\nfrom loraplex_common.log import configure, get_logger\n" + textwrap.dedent(code)
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60)
    return result.stdout, result.stderr.splitlines()


def test_json_logs_are_one_object_a_line_libraries_included() -> None:
    stdout, lines = run(
        """
        early = get_logger(part="scheduler")
        configure("engine", "info", "json")
        early.info("step", rows=3)
        get_logger().debug("not shown")
        logging.getLogger("uvicorn").warning("from %s", "a library")
        """
    )

    first, second = map(json.loads, lines)
    assert stdout == ""
    assert (first["event"], first["rows"], first["part"]) == ("step", 3, "scheduler")
    assert (first["service"], first["level"]) == ("engine", "info")
    assert (second["event"], second["level"], second["service"]) == ("from a library", "warning", "engine")
    assert "timestamp" in first


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_tracebacks_show_no_local_variables(fmt: str) -> None:
    _, lines = run(
        f"""
        configure("engine", "info", "{fmt}")
        def handle(prompt):
            api_key = "sk-" + "secret"
            raise KeyError("x")
        try:
            handle("my " + "prompt")
        except KeyError:
            get_logger().exception("failed")
        """
    )

    text = "\n".join(lines)
    assert "KeyError" in text
    assert "handle" in text
    assert "sk-secret" not in text
    assert "my prompt" not in text


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="'loud' is not one of"):
        log.configure("engine", "loud")
