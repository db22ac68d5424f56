// silu_mul_fp8.cu for more rows than keep multiprocessors busy, with one scale each: the same results, of small CTAs.
//
// A CTA loads its row, finds its largest value, and stores; several on a multiprocessor do so at different times, where a large
// one leaves memory idle while it computes. The row waits for its largest value in shared memory, not in registers.
// Grid: one CTA per row. Block: 256 threads. Shared memory: the row and one float per warp.
// Alignment: WIDTH % (16 / sizeof(elem)) == 0. Registers: 6 CTAs per SM, hence at most 40. Architectures: sm_80 and up.
// Sources: silu_mul.cu, fp8.cuh.
#include "pointwise/silu_mul_fp8.cuh"

constexpr int kThreads = 256;
constexpr int kTurns = (kWidth / kVec + kThreads - 1) / kThreads;
static_assert(!kGroups, "rows with several scales are silu_mul_fp8.cu's");

struct Shared {
    Vec row[kWidth / kVec];
    float maxima[kThreads / kWarp];
};

extern "C" __global__ void __launch_bounds__(kThreads, 6) silu_mul_fp8_many(const Params p) {
    LORAPLEX_SHARED(Shared, shared);
    float largest = 0.f;
    allow_dependents();
    dependency_wait();
    const i64 row = blockIdx.x;
#pragma unroll 2
    for (int turn = 0; turn < kTurns; ++turn) {
        const int index = turn * kThreads + static_cast<int>(threadIdx.x), column = index * kVec;
        if (column >= kWidth) continue;
        const Vec values = activate(p, row, column);
        if (p.out) store_vec(p.out + row * kWidth + column, values);
        shared.row[index] = values;
        largest = fmaxf(largest, largest_of(values));
    }
    largest = fmaxf(block_max<kThreads>(largest, shared.maxima), kLeastScaled);
    if (threadIdx.x == 0) p.quantised.scales[row] = largest / kLargestCode;
    for (int index = threadIdx.x; index < kWidth / kVec; index += kThreads)  // a thread reads what it wrote
        store_codes(shared.row[index], largest, p.quantised.codes + row * kWidth + index * kVec);
}
