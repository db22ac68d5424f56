// y = w * x / sqrt(mean(x^2) + eps), optionally after residual += x (then y norms the sum). Rounding as transformers'
// LlamaRMSNorm: the sum and the normalised value are rounded to the element type, the mean is fp32. With NORM_OFFSET y is
// (1 + w) * x / ..., rounded once, as GemmaRMSNorm.
//
// Grid: one CTA per row. Block: kThreads, each holding kVecs vectors of 16 bytes of the row in registers, so a row is
// read once. Shared memory: one float per warp. Alignment: rows start on 16 bytes; HIDDEN % (16 / sizeof(elem)) == 0.
// Registers: 512 threads x 4 CTAs per SM = all 2048 threads, hence at most 32; HIDDEN > 4096: 64 (2 CTAs).
// Architectures: sm_80 and up. Source: Zhang and Sennrich, arXiv:1910.07467.
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
    elem* out;           // [num_rows, HIDDEN]
    const int* rows;     // [num_rows] rows to read, each at most once; null: row i; -1: padding, out is zeroed
    float eps;
    int num_rows;
};
static_assert(sizeof(Params) == 48, "params.py mirrors it");

__device__ __forceinline__ void clear_row(elem* row) {
    for (int column = threadIdx.x * kVec; column < kHidden; column += kThreads * kVec) store_vec(row + column, Vec{});
}

extern "C" __global__ void __launch_bounds__(kThreads, kVecs > 1 ? 1024 / kThreads : 2048 / kThreads) rms_norm(const Params p) {
    __shared__ float scratch[kThreads / kWarp];
    allow_dependents();
    dependency_wait();
    const i64 row = p.rows ? p.rows[blockIdx.x] : static_cast<int>(blockIdx.x);
    if (row < 0) return clear_row(p.out + static_cast<i64>(blockIdx.x) * kHidden);
    float values[kVecs][kVec];
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
        const int column = (i * kThreads + static_cast<int>(threadIdx.x)) * kVec;
        if (column >= kHidden) continue;
        Vec in = load_vec((p.x ? p.x : p.residual) + row * kHidden + column);
        if (p.x && p.residual) {
            const Vec old = load_vec(p.residual + row * kHidden + column);
#pragma unroll
            for (int j = 0; j < kVec; ++j) in.v[j] = from_float<elem>(to_float(in.v[j]) + to_float(old.v[j]));
            store_vec(p.residual + row * kHidden + column, in);
        }
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            values[i][j] = to_float(in.v[j]);
            squares += values[i][j] * values[i][j];
        }
    }
    const float scale = rsqrtf(block_sum<kThreads>(squares, scratch) / kHidden + p.eps);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
        const int column = (i * kThreads + static_cast<int>(threadIdx.x)) * kVec;
        if (column >= kHidden) continue;
        const Vec weight = load_vec(p.weight + column);
        Vec out;
#pragma unroll
        for (int j = 0; j < kVec; ++j) out.v[j] = from_float<elem>(normed(values[i][j], scale, to_float(weight.v[j])));
        store_vec(p.out + static_cast<i64>(blockIdx.x) * kHidden + column, out);
    }
}
