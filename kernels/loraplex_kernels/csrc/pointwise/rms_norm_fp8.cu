// rms_norm.cu, and its result in e4m3 for the product that follows: the residual sum, the norm and its rounding are the same.
// Without `out` the e4m3 form is all that is written: nothing but the product reads the result.
//
// Grid: one CTA per row. Block: kThreads, each holding kVecs vectors of 16 bytes of the row in registers. Shared memory: one
// float per warp. Alignment: rows start on 16 bytes; HIDDEN % (16 / sizeof(elem)) == 0.
// Registers: 512 threads x 4 CTAs per SM = all 2048 threads, hence at most 32; HIDDEN > 4096: 64 (2 CTAs).
// Architectures: sm_80 and up. Sources: rms_norm.cu, fp8.cuh.
#include "pointwise/fp8.cuh"
#include "pointwise/norm.cuh"

constexpr int kHidden = HIDDEN;
constexpr int kThreads = THREADS;
constexpr int kVecs = (kHidden / kVec + kThreads - 1) / kThreads;
static_assert(kHidden % kVec == 0, "rows are read as 16-byte vectors");
static_assert(kThreads % kWarp == 0 && kThreads <= 1024, "whole warps");

struct Params {
    const elem* x;       // [rows, HIDDEN]; may be null when residual is given
    elem* residual;      // [rows, HIDDEN], updated in place; null: there is none
    const elem* weight;  // [HIDDEN]
    elem* out;           // [rows, HIDDEN], or null
    Quantised quantised;
    float eps;
    int reserved;
};
static_assert(sizeof(Params) == 64, "fp8_params.py mirrors it");

extern "C" __global__ void __launch_bounds__(kThreads, kVecs > 1 ? 1024 / kThreads : 2048 / kThreads) rms_norm_fp8(const Params p) {
    __shared__ float sums[kThreads / kWarp], maxima[kThreads / kWarp];
    allow_dependents();
    dependency_wait();
    const i64 row = blockIdx.x;
    Vec values[kVecs];
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
        const int column = (i * kThreads + static_cast<int>(threadIdx.x)) * kVec;
        values[i] = Vec{};
        if (column >= kHidden) continue;
        values[i] = load_vec((p.x ? p.x : p.residual) + row * kHidden + column);
        if (p.x && p.residual) {
            const Vec old = load_vec(p.residual + row * kHidden + column);
#pragma unroll
            for (int j = 0; j < kVec; ++j) values[i].v[j] = from_float<elem>(to_float(values[i].v[j]) + to_float(old.v[j]));
            store_vec(p.residual + row * kHidden + column, values[i]);
        }
#pragma unroll
        for (int j = 0; j < kVec; ++j) squares += to_float(values[i].v[j]) * to_float(values[i].v[j]);
    }
    const float scale = rsqrtf(block_sum<kThreads>(squares, sums) / kHidden + p.eps);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
        const int column = (i * kThreads + static_cast<int>(threadIdx.x)) * kVec;
        if (column >= kHidden) continue;
        const Vec weight = load_vec(p.weight + column);
#pragma unroll
        for (int j = 0; j < kVec; ++j)
            values[i].v[j] = from_float<elem>(normed(to_float(values[i].v[j]), scale, to_float(weight.v[j])));
        if (p.out) store_vec(p.out + row * kHidden + column, values[i]);
    }
    quantise_row<kThreads, kHidden>(values, row, p.quantised, maxima);
}
