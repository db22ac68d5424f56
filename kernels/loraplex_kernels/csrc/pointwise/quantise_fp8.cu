// Rows of activations in e4m3, for products whose input no kernel of this folder has quantised while it computed it.
//
// Grid: one CTA per row. Block: kThreads, each holding kVecs vectors of 16 bytes of the row in registers. Shared memory: one
// float per warp. Alignment: rows start on 16 bytes; WIDTH % (16 / sizeof(elem)) == 0.
// Registers: 1024 threads x 1 CTA per SM, hence at most 64. Architectures: sm_80 and up. Source: fp8.cuh.
#include "pointwise/fp8.cuh"

constexpr int kWidth = WIDTH;
constexpr int kThreads = THREADS;
constexpr int kVecs = (kWidth / kVec + kThreads - 1) / kThreads;
static_assert(kWidth % kVec == 0, "rows are read as 16-byte vectors");
static_assert(kThreads % kWarp == 0 && kThreads <= 1024, "whole warps");

struct Params {
    const elem* x;  // [rows, WIDTH]
    Quantised quantised;
};
static_assert(sizeof(Params) == 32, "fp8_params.py mirrors it");

extern "C" __global__ void __launch_bounds__(kThreads, 1024 / kThreads) quantise_fp8(const Params p) {
    __shared__ float maxima[kThreads / kWarp];
    allow_dependents();
    dependency_wait();
    const i64 row = blockIdx.x;
    Vec values[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
        const int column = (i * kThreads + static_cast<int>(threadIdx.x)) * kVec;
        values[i] = column < kWidth ? load_vec(p.x + row * kWidth + column) : Vec{};
    }
    quantise_row<kThreads, kWidth>(values, row, p.quantised, maxima);
}
