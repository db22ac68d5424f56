// The kernel behind o's and down's product in steps whose adapters have c or b: finishes the product as lora/finish.cu does, adds it
// to the residual stream, and writes that stream's norm as pointwise/rms_norm.cu does.
//
//     residual += c * (y - base_bias) + base_bias + scale * b;   out = weight * residual / sqrt(mean(residual^2) + eps)
//
// Grid: one CTA per row. Block: kThreads, each holding kVecs vectors of 16 bytes of the row. What a row's adapter has is on its
// way while the product ends. Shared memory: one float per warp. Alignment: rows start on 16 bytes.
// Registers: 512 threads x 2 CTAs per SM, hence at most 64. Architectures: sm_80 and up.
#include "lora/finish.cuh"
#include "pointwise/norm.cuh"

constexpr int kHidden = HIDDEN;
constexpr int kThreads = THREADS;
constexpr int kVecs = (kHidden / kVec + kThreads - 1) / kThreads;
static_assert(kHidden % kVec == 0, "rows are read as 16-byte vectors");
static_assert(kThreads % kWarp == 0 && kThreads <= 1024, "whole warps");

struct Params {
    PartTables tables;
    const VectorEntry* scales;  // [adapters][layers][ops], already advanced to this layer and op
    const VectorEntry* biases;  // the same
    const elem* y;              // [rows, HIDDEN]
    const float* scale;         // [rows]; the request's factor on b
    const elem* base_bias;      // [HIDDEN], in y already; or null
    elem* residual;             // [rows, HIDDEN], updated in place
    const elem* weight;         // [HIDDEN]
    elem* out;                  // [rows, HIDDEN]
    float eps;
    int reserved;
};
static_assert(sizeof(Params) == 104, "params.py mirrors it");

extern "C" __global__ void __launch_bounds__(kThreads, 1024 / kThreads) lora_finish_norm(const Params p) {
    __shared__ float scratch[kThreads / kWarp];
    allow_dependents();
    const i64 row = blockIdx.x;
    const int adapter = p.tables.adapters[row];
    SliceVector c = {}, b = {};
    if (adapter >= 0) {
        const i64 entry = adapter * p.tables.entry_stride;
        c = load_slice(p.scales + entry, 0);
        b = load_slice(p.biases + entry, 0);
    }
    Finish early = {};  // of longer rows, what comes behind it is asked for with y, as registers are few
    if (static_cast<int>(threadIdx.x) * kVec < kHidden) early = load_finish(p.tables, c, b, threadIdx.x * kVec);
    dependency_wait();
    const bool finishes = c.step != 0 || b.step != 0;
    const float scale_of_row = p.scale[row];
    float values[kVecs][kVec];
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
        const int column = (i * kThreads + static_cast<int>(threadIdx.x)) * kVec;
        if (column >= kHidden) continue;
        const i64 at = row * kHidden + column;
        Vec in = load_vec(p.y + at);
        const Vec old = load_vec(p.residual + at);
        if (finishes) {
            const elem* bias = p.base_bias == nullptr ? nullptr : p.base_bias + column;
            in = finished(in, i == 0 ? early : load_finish(p.tables, c, b, column), c, bias, scale_of_row);
        }
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            in.v[j] = from_float<elem>(to_float(in.v[j]) + to_float(old.v[j]));
            values[i][j] = to_float(in.v[j]);
            squares += values[i][j] * values[i][j];
        }
        store_vec(p.residual + at, in);
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
        store_vec(p.out + row * kHidden + column, out);
    }
}
