"""Large buffers that are freed leave the process, whatever small objects were made beside them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MANY_LARGE_BUFFERS = """
import sys
from pathlib import Path
from loraplex_common.heap import keep_heap_small

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * {page} / 2**20

if sys.argv[1] == "small":
    keep_heap_small()
del (first := [bytearray(16 * 2**20)])[0]
before, large, small = resident_mib(), [], []
for _ in range(50):
    large.append(bytearray(2 * 2**20))
    small.append(bytes(2000))
large.clear()
print(resident_mib() - before)
"""


def grown_mib(how: str, environment: dict[str, str]) -> float:
    script = MANY_LARGE_BUFFERS.format(page=os.sysconf("SC_PAGE_SIZE"))
    done = subprocess.run(
        [sys.executable, "-c", script, how], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def test_freed_buffers_of_megabytes_go_back_to_the_system() -> None:
    assert grown_mib("small", {}) < 5
    assert grown_mib("as it is", {}) > 50, "this C library gives memory back by itself: the module can go"


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "1073741824"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1073741824"},
    ],
    ids=["variables", "tunables"],
)
def test_what_an_operator_sets_stays(environment: dict[str, str]) -> None:
    assert grown_mib("small", environment) > 50
