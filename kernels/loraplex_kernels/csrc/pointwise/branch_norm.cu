// What attention or MLP has computed joins the residual stream, behind a norm of its own and a factor, and the next norm follows:
//
//   residual += multiplier * norm_after(x); y = norm_before(residual)
//
// norm_after is there with AFTER, norm_before with BEFORE: without the one x is added as it is, without the other y is the
// residual. Norms and their rounding are those of rms_norm.cu, with NORM_OFFSET too.
//
// Grid: one CTA per row. Block: kThreads, each holding kVecs vectors of 16 bytes of the row in registers, so x and the residual
// are read once. Shared memory: one float per warp. Alignment: rows start on 16 bytes; HIDDEN % (16 / sizeof(elem)) == 0.
// Registers: 512 threads x 4 CTAs per SM = all 2048 threads, hence at most 32; HIDDEN > 4096: 64 (2 CTAs).
// Architectures: sm_80 and up. Source: Gemma Team, arXiv:2408.00118 (norms around each sub-layer).
#include "pointwise/norm.cuh"

constexpr int kHidden = HIDDEN;
constexpr int kThreads = THREADS;
constexpr int kVecs = (kHidden / kVec + kThreads - 1) / kThreads;
static_assert(kHidden % kVec == 0, "rows are read as 16-byte vectors");
static_assert(kThreads % kWarp == 0 && kThreads <= 1024, "whole warps");

struct Params {
    const elem* x;       // [rows, HIDDEN]
    elem* residual;      // [rows, HIDDEN], updated in place
    const elem* after;   // [HIDDEN], with AFTER
    const elem* before;  // [HIDDEN], with BEFORE
    elem* out;           // [num_rows, HIDDEN], or null
    const int* rows;     // [num_rows] rows to read, each at most once; null: row i; -1: padding, out is zeroed
    float eps;
    float multiplier;
};
static_assert(sizeof(Params) == 56, "params.py mirrors it");

struct Row {
    float v[kVecs][kVec];
};
// Calls act(i, column) for each vector that a thread has of the row.
template <class Act>
__device__ __forceinline__ void each_vector(const Act& act) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
        const int column = (i * kThreads + static_cast<int>(threadIdx.x)) * kVec;
        if (column < kHidden) act(i, column);
    }
}

__device__ __forceinline__ void norm_row(const elem* weight, float eps, float* scratch, Row& row) {
    float squares = 0.f;
    each_vector([&](int i, int) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) squares += row.v[i][j] * row.v[i][j];
    });
    const float scale = rsqrtf(block_sum<kThreads>(squares, scratch) / kHidden + eps);
    each_vector([&](int i, int column) {
        const Vec weights = load_vec(weight + column);
#pragma unroll
        for (int j = 0; j < kVec; ++j) row.v[i][j] = rounded(normed(row.v[i][j], scale, to_float(weights.v[j])));
    });
}

__device__ __forceinline__ void load_row(const elem* from, Row& row) {
    each_vector([&](int i, int column) {
        const Vec vec = load_vec(from + column);
#pragma unroll
        for (int j = 0; j < kVec; ++j) row.v[i][j] = to_float(vec.v[j]);
    });
}
__device__ __forceinline__ void store_row(elem* to, const Row& row) {
    each_vector([&](int i, int column) {
        Vec vec;
#pragma unroll
        for (int j = 0; j < kVec; ++j) vec.v[j] = from_float<elem>(row.v[i][j]);
        store_vec(to + column, vec);
    });
}
// row = old + multiplier * row, rounded once.
__device__ __forceinline__ void add_row(const elem* old, float multiplier, Row& row) {
    each_vector([&](int i, int column) {
        const Vec vec = load_vec(old + column);
#pragma unroll
        for (int j = 0; j < kVec; ++j) row.v[i][j] = rounded(to_float(vec.v[j]) + multiplier * row.v[i][j]);
    });
}

extern "C" __global__ void __launch_bounds__(kThreads, kVecs > 1 ? 1024 / kThreads : 2048 / kThreads) branch_norm(const Params p) {
    __shared__ float scratch[kThreads / kWarp];
    allow_dependents();
    dependency_wait();
    const i64 at = static_cast<i64>(p.rows ? p.rows[blockIdx.x] : static_cast<int>(blockIdx.x)) * kHidden;
    elem* out = p.out ? p.out + static_cast<i64>(blockIdx.x) * kHidden : nullptr;
    Row row = {};
    if (at < 0) {
        if (out) store_row(out, row);
        return;
    }
    load_row(p.x + at, row);
#ifdef AFTER
    norm_row(p.after, p.eps, scratch, row);
#endif
    add_row(p.residual + at, p.multiplier, row);
    store_row(p.residual + at, row);
    if (!out) return;
#ifdef BEFORE
    norm_row(p.before, p.eps, scratch, row);
#endif
    store_row(out, row);
}
