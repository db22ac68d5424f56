"""Child processes that never outlive their parent."""

from __future__ import annotations

import os
import sys
from typing import Final

# This runs in the child before it becomes the command: the kernel ends the child when its parent thread dies
# (PR_SET_PDEATHSIG = 1, kept across exec). A preexec_fn may deadlock in a process with threads. The parent may already
# be gone.
_LAUNCHER: Final = """
import ctypes, os, signal, sys
if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM, 0, 0, 0) != 0:
    sys.exit("prctl(PR_SET_PDEATHSIG): " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(sys.argv[1]):
    sys.exit("parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def owned_command(command: list[str]) -> list[str]:
    """Return a command line that runs ``command`` until it ends or the thread that starts it does (SIGTERM).

    Start it on a thread that lives as long as the child should: Linux ties the child's life to the thread. Elsewhere
    the command is returned as it is.

    Args:
        command: Absolute path of the program and its arguments.
    """
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
