"""What sanitize.sh runs under compute-sanitizer; exits with 1 if a result is wrong."""

from __future__ import annotations

import sys

import torch
from kernels.device_cases import run_all
from loraplex_kernels.module import KernelLibrary

if __name__ == "__main__":
    failures = run_all(lambda dtype: KernelLibrary(torch.device("cuda", 0), dtype))
    torch.cuda.synchronize()
    sys.exit("\n".join(failures) or None)
