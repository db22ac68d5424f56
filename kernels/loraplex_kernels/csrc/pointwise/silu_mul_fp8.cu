// silu_mul.cu, and its result in e4m3 for the product that follows: the rounding is the same. For few rows, each of which has a
// multiprocessor of its own.
//
// Grid: one CTA per row, as the largest value of a row sets its scale. Block: kThreads, each holding kVecs vectors of 16 bytes
// of the result in registers. Shared memory: one float per warp. Alignment: WIDTH % (16 / sizeof(elem)) == 0.
// Registers: 1024 threads x 1 CTA per SM, hence at most 64. Architectures: sm_80 and up. Sources: silu_mul.cu, fp8.cuh.
#include "pointwise/silu_mul_fp8.cuh"

constexpr int kThreads = THREADS;
constexpr int kVecs = (kWidth / kVec + kThreads - 1) / kThreads;
static_assert(kThreads % kWarp == 0 && kThreads <= 1024, "whole warps");

extern "C" __global__ void __launch_bounds__(kThreads, 1024 / kThreads) silu_mul_fp8(const Params p) {
    __shared__ float maxima[kThreads / kWarp];
    allow_dependents();
    dependency_wait();
    const i64 row = blockIdx.x;
    Vec values[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
        const int column = (i * kThreads + static_cast<int>(threadIdx.x)) * kVec;
        values[i] = Vec{};
        if (column >= kWidth) continue;
        values[i] = activate(p, row, column);
        store_vec(p.out + row * kWidth + column, values[i]);
    }
    quantise_row<kThreads, kWidth>(values, row, p.quantised, maxima);
}
