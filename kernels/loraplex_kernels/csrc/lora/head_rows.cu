// logits[t, ids[i]] = values[i] . x[t] for the rows of lm_head that an adapter replaces, in the place of the base's logit and of
// its pair's delta, so behind both. fp32 sums in a fixed order, one rounding: a token's logits do not depend on its batch.
//
// Grid: (shares of a group's rows, groups of <= 8 tokens of one adapter). Block: 8 warps; a warp takes 4 rows at a time, which are
// read once for all tokens of the group: 64 bytes on their way per lane. x comes from L1. No shared memory.
// Alignment: columns % (16 / sizeof(elem)) == 0, x rows on 16 bytes.
// Registers: 2 CTAs of 256 threads per SM, hence at most 128. Architectures: sm_80 and up.
#include "lora/token_rows.cuh"

constexpr int kWarps = 8;
constexpr int kRows = 4;
static_assert(kRows * kGroupTokens == kWarp, "a lane writes one logit");

struct Params {
    LoraTables lora;  // its entries are RowsEntry; groups: [groups]
    const elem* x;    // [tokens, columns]
    elem* logits;     // [tokens, stride]
    i64 stride;
    int columns;
    int width;  // tokens that a row of logits has; rows of others are left out
};
static_assert(sizeof(Params) == 88, "row_params.py mirrors it");

__device__ __forceinline__ void widen(const Quad& q, float (&v)[kVec]) {
    const u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#ifdef LORAPLEX_FP32
        v[i] = __uint_as_float(words[i]);
#else
        v[2 * i] = low_float(words[i]), v[2 * i + 1] = high_float(words[i]);
#endif
    }
}

// Products of up to kRows rows from `first` on with each token of the group.
__device__ __forceinline__ void multiply(const Params& p, const Rows& rows, const Group& group, int first) {
    const int lane = threadIdx.x % kWarp;
    const u8* from[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) from[r] = values_at(p.lora, rows, min(first + r, rows.count - 1), p.columns);
    float sums[kRows][kGroupTokens] = {};
#pragma unroll 1
    for (int column = lane * kVec; column < p.columns; column += kWarp * kVec) {
        Quad raw[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) raw[r] = load_weights16(from[r] + column * static_cast<int>(sizeof(elem)));
        float values[kRows][kVec];
#pragma unroll
        for (int r = 0; r < kRows; ++r) widen(raw[r], values[r]);
#pragma unroll
        for (int t = 0; t < kGroupTokens; ++t) {
            if (t >= group.count) break;
            float x[kVec];
            widen(*reinterpret_cast<const Quad*>(p.x + static_cast<i64>(group.tokens[t]) * p.columns + column), x);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
#pragma unroll
                for (int j = 0; j < kVec; ++j) sums[r][t] += values[r][j] * x[j];
            }
        }
    }
    float own = 0.f;
#pragma unroll
    for (int t = 0; t < kGroupTokens; ++t) {
        if (t >= group.count) break;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const float sum = warp_sum(sums[r][t]);
            if (lane == t * kRows + r) own = sum;
        }
    }
    const int row = first + lane % kRows, t = lane / kRows;
    if (row >= rows.count || t >= group.count) return;
    const int id = token_at(p.lora, rows, row);
    if (id < p.width) p.logits[p.lora.groups[blockIdx.y].tokens[t] * p.stride + id] = from_float<elem>(own);
}

extern "C" __global__ void __launch_bounds__(kWarps * kWarp, 2) head_rows(const Params p) {
    allow_dependents();
    const Group group = p.lora.groups[blockIdx.y];
    const RowsEntry* entries = reinterpret_cast<const RowsEntry*>(p.lora.entries);
    const Rows rows = load_rows_entry(entries + group.adapter * p.lora.entry_stride);
    const int warp = blockIdx.x * kWarps + threadIdx.x / kWarp;
    dependency_wait();
#pragma unroll 1
    for (int first = warp * kRows; first < rows.count; first += gridDim.x * kWarps * kRows) multiply(p, rows, group, first);
}
