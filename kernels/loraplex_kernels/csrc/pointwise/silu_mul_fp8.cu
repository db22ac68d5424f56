// silu_mul.cu, and its result in e4m3 for the product that follows: the rounding is the same.
//
// Grid: one CTA per row, as the largest value of a row sets its scale. Block: kThreads, each holding kVecs vectors of 16 bytes
// of the result in registers. Shared memory: one float per warp. Alignment: WIDTH % (16 / sizeof(elem)) == 0.
// Registers: 1024 threads x 1 CTA per SM, hence at most 64. Architectures: sm_80 and up. Sources: silu_mul.cu, fp8.cuh.
#include "pointwise/fp8.cuh"
#include "pointwise/silu.cuh"

constexpr int kWidth = WIDTH;
constexpr int kThreads = THREADS;
constexpr int kVecs = (kWidth / kVec + kThreads - 1) / kThreads;
static_assert(kWidth % kVec == 0, "rows are read as 16-byte vectors");
static_assert(kThreads % kWarp == 0 && kThreads <= 1024, "whole warps");

struct Params {
    const elem* gate_up;  // [rows, 2 * WIDTH]
    elem* out;            // [rows, WIDTH]
    const float* delta;   // same shape as gate_up, or null
    Quantised quantised;
};
static_assert(sizeof(Params) == 48, "fp8_params.py mirrors it");

__device__ __forceinline__ float with_delta(const elem& value, const float* delta) {
    return delta == nullptr ? to_float(value) : rounded(to_float(value) + *delta);
}

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
        const i64 at = row * 2 * kWidth + column;
        const Vec gates = load_vec(p.gate_up + at), ups = load_vec(p.gate_up + at + kWidth);
        const float* delta = p.delta == nullptr ? nullptr : p.delta + at;
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            const float gate = with_delta(gates.v[j], delta ? delta + j : nullptr);
            const float up = with_delta(ups.v[j], delta ? delta + kWidth + j : nullptr);
            values[i].v[j] = from_float<elem>(gated(gate, up));
        }
        store_vec(p.out + row * kWidth + column, values[i]);
    }
    quantise_row<kThreads, kWidth>(values, row, p.quantised, maxima);
}
