"""The processes of a tensor-parallel engine, as the kernel lists them."""

from __future__ import annotations

from pathlib import Path


def followers_of(engine_pid: int) -> list[int]:
    """Return the processes of an engine's ranks besides rank 0."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except (OSError, IndexError):  # it has ended meanwhile
            continue
        if parent == engine_pid and b"loraplex_engine.ranks" in words:
            found.append(int(folder.name))
    return sorted(found)


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that its parent has not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in ("Z", "X")
