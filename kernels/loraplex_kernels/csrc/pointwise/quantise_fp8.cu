// Rows of activations in e4m3, for products whose input no kernel of this folder has quantised while it computed it.
//
// SHARES CTAs share a row: with GROUPS, or with MAXIMA, where whoever wrote the row said what the largest of its numbers are, in MAXIMA
// parts. Else a row is one CTA's, which looks for the largest.
// Grid: SHARES CTAs per row. Block: kThreads, each holding kVecs vectors of 16 bytes of the row in registers. Shared memory: one
// float per warp. Alignment: rows start on 16 bytes; WIDTH % (16 / sizeof(elem)) == 0.
// Registers: 1024 threads x 1 CTA per SM, hence at most 64. Architectures: sm_80 and up. Source: fp8.cuh.
#include "pointwise/fp8.cuh"

constexpr int kWidth = WIDTH;
constexpr int kThreads = THREADS;
constexpr int kShares = SHARES;
#ifdef MAXIMA
constexpr int kMaxima = MAXIMA;
#else
constexpr int kMaxima = 0;
#endif
constexpr int kShareVecs = (kWidth / kVec + kShares * kGroupLanes - 1) / (kShares * kGroupLanes) * kGroupLanes;
constexpr int kVecs = (kShareVecs + kThreads - 1) / kThreads;
static_assert(kWidth % kVec == 0, "rows are read as 16-byte vectors");
static_assert(kThreads % kWarp == 0 && kThreads <= 1024, "whole warps");
static_assert(kShares == 1 || kGroups || kMaxima > 0, "a row's largest value is not in a CTA's share");

struct Params {
    const elem* x;        // [rows, WIDTH]
    const float* maxima;  // [rows, MAXIMA]; null without
    Quantised quantised;
};
static_assert(sizeof(Params) == 40, "fp8_params.py mirrors it");

extern "C" __global__ void __launch_bounds__(kThreads, 1024 / kThreads) quantise_fp8(const Params p) {
    __shared__ float scratch[kThreads / kWarp];
    allow_dependents();
    dependency_wait();
    const i64 row = blockIdx.x / kShares;
    const int first = static_cast<int>(blockIdx.x) % kShares * kShareVecs, end = min(first + kShareVecs, kWidth / kVec);
    Vec values[kVecs];
    float largest[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
        const int at = first + i * kThreads + static_cast<int>(threadIdx.x);
        values[i] = at < end ? load_vec(p.x + row * kWidth + at * kVec) : Vec{};
        largest[i] = kMaxima > 0 ? 0.f : largest_of(values[i]);
    }
    for (int i = static_cast<int>(threadIdx.x); i < kMaxima; i += kThreads)
        largest[0] = fmaxf(largest[0], p.maxima[row * kMaxima + i]);
    find_largest(largest, [&](float own) { return block_max<kThreads>(own, scratch); });
    if (!kGroups && threadIdx.x == 0 && first == 0) p.quantised.scales[row] = largest[0] / kLargestCode;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
        const int at = first + i * kThreads + static_cast<int>(threadIdx.x);
        if (at < end) store_quantised<kWidth>(values, i, row, at * kVec, largest, p.quantised);
    }
}
