"""What sanitize.sh runs under compute-sanitizer; exits with 1 if a result is wrong."""

from __future__ import annotations

import sys

import torch
from kernels.device_cases import run_all
from kernels.fp8_product_cases import ProductCase, ProductNumbers
from kernels.kernel_cases import relative_error
from loraplex_kernels.module import KernelLibrary
from loraplex_kernels.products.fp8_cut import choose_cuts


def fp8_products() -> list[str]:
    """Return which products of few rows with FP8 weights are wrong, where there is a kernel for them."""
    library = KernelLibrary(torch.device("cuda", 0), torch.bfloat16)
    failures = []
    for has_groups in (False, True) if library.arch == "sm_90a" else ():
        for num_sms in (132, 2):  # two CTAs share the inputs; wide
            case = ProductCase(rows=5, inputs=656, outputs=328, has_groups=has_groups, has_bias=True)
            numbers, cut = ProductNumbers(case, library.device), choose_cuts(case.outputs, num_sms)[0]
            if not relative_error(numbers.launched(library, cut), numbers.expected()) < 4e-3:
                failures.append(f"fp8_product, {cut}, groups {has_groups}")
            if (
                cut.can_gate
                and not has_groups
                and not torch.equal(numbers.gated(library, cut)[0], numbers.gated_apart(library, cut))
            ):
                failures.append(f"fp8_product with a gate, {cut}")
    return failures


if __name__ == "__main__":
    failures = [*run_all(lambda dtype: KernelLibrary(torch.device("cuda", 0), dtype)), *fp8_products()]
    torch.cuda.synchronize()
    sys.exit("\n".join(failures) or None)
