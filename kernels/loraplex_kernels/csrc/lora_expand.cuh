// delta[t][n] = scaling * scale[t] * (sum over planes of h[plane][t]) * B^T for a run of outputs of one slice, left in
// shared memory as fp32 for the pointwise work that follows: the second half of LoRA at decode.
//
// Work item: (group of <= 8 tokens, run of outputs): begin = first output in the op's fused outputs, extent = how many;
// a run stays within a slice and starts on a multiple of 16. items.py sizes runs by bytes, so a rank-64 adapter's runs
// are a quarter as long as a rank-16 adapter's.
// bf16: mma.m16n8k16 with outputs as M, rank as K, tokens as N; B goes from global memory straight into fragments. h is
// split into two bf16 (high + low), so the product keeps the fp32 precision of h at the price of idle tensor cores.
// fp32: scalar FMAs. Block: 8 warps; each takes every eighth run of 16 outputs.
#pragma once
#include "lora_table.cuh"

constexpr int kExpandThreads = 256;
constexpr int kExpandWarps = kExpandThreads / kWarp;
constexpr int kRunRows = 16;   // outputs per mma
constexpr int kHPad = 8;       // keeps fragment reads of neighbouring tokens in different banks

struct ExpandParams {
    const float* h;      // [planes][tokens][h_stride]
    const float* scale;  // [tokens] the requests' own factors
    i64 h_plane;
    int h_stride;
    int num_planes;
    int slice_begin[kSlices + 1];  // first fused output of each slice; unused slices are empty
};
static_assert(sizeof(ExpandParams) == 48, "params.py mirrors it");

#ifdef LORAPLEX_FP32
struct HiddenTile {
    float v[kGroupTokens][kMaxRank + kHPad];
};
#else
struct HiddenTile {
    u16 high[kGroupTokens][kMaxRank + kHPad];
    u16 low[kGroupTokens][kMaxRank + kHPad];
};
#endif

__device__ __forceinline__ int slice_of(const ExpandParams& p, int n) {
    int slice = 0;
#pragma unroll
    for (int s = 1; s < kSlices; ++s) slice += n >= p.slice_begin[s];
    return slice;
}

__device__ __forceinline__ int first_rank_row(const OpEntry& e, int slice) {
    int row = 0;
#pragma unroll
    for (int s = 0; s < kSlices - 1; ++s) row += s < slice ? e.rank[s] : 0;
    return row;
}

// Asks for a run's weights before anything is waited for.
__device__ __forceinline__ void prefetch_run(const LoraTables& t, const OpEntry& e, int slice, int n, int count) {
    if (e.rank[slice] == 0) return;
    const int row_bytes = e.rank[slice] * static_cast<int>(sizeof(elem));
    const int line_rows = max(1, 128 / row_bytes);
    for (int row = threadIdx.x * line_rows; row < count; row += kExpandThreads * line_rows) {
        const u8* from = b_address(t, e, slice, n + row);
        for (int byte = 0; byte < max(row_bytes, 1); byte += 128) prefetch_l2(from + byte);
    }
}

// Sums the planes of the group's h for one slice and scales; columns up to the next multiple of 16 are zeroed.
__device__ __forceinline__ void stage_hidden(const ExpandParams& p, const OpEntry& e, const Group& group, int slice,
                                             HiddenTile& tile) {
    const int rank = e.rank[slice], padded = (rank + 15) / 16 * 16, first = first_rank_row(e, slice);
    for (int i = threadIdx.x; i < padded * kGroupTokens; i += kExpandThreads) {
        const int t = i / padded, r = i % padded;
        float v = 0.f;
        if (t < group.count && r < rank) {
            const float* from = p.h + static_cast<i64>(group.tokens[t]) * p.h_stride + first + r;
            for (int plane = 0; plane < p.num_planes; ++plane) v += from[plane * p.h_plane];
            v *= e.scaling[slice] * p.scale[group.tokens[t]];
        }
#ifdef LORAPLEX_FP32
        tile.v[t][r] = v;
#else
        tile.high[t][r] = bf16_bits(v);
        tile.low[t][r] = bf16_bits(v - to_float(bf16{tile.high[t][r]}));
#endif
    }
}

#ifndef LORAPLEX_FP32
// kColumns elements of a row of B from column k on, as mma fragments: one load where the rank allows, else one by one.
template <int kColumns>
struct Columns {
    u32 pair[kColumns / 2];
};
template <int kColumns, bool kAligned>
__device__ __forceinline__ Columns<kColumns> load_columns(const u8* row, int k, int rank) {
    Columns<kColumns> out = {};
    if constexpr (kAligned && kColumns == 8) {
        const Quad q = load_weights16(row + 2 * k);
        out.pair[0] = q.x, out.pair[1] = q.y, out.pair[2] = q.z, out.pair[3] = q.w;
    } else if constexpr (kAligned) {
        if (k >= rank) return out;
        const Pair q = load_weights8(row + 2 * k);
        out.pair[0] = q.x, out.pair[1] = q.y;
    } else {
        const u16* from = reinterpret_cast<const u16*>(row);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            if (k + i < rank) out.pair[i / 2] |= static_cast<u32>(from[k + i]) << (i % 2 * 16);
        }
    }
    return out;
}

// kRuns runs of 16 outputs, 8 runs apart, by one warp; all their loads of a k-step are issued before the first product.
// A step is 4 * kColumns of the rank: lane (g, c) holds kColumns of rows g and g + 8.
template <int kRuns, int kColumns, bool kAligned>
__device__ __forceinline__ void expand_runs(const LoraTables& t, const OpEntry& e, const Group& group, int slice, int n,
                                            int count, int run, const HiddenTile& tile, float* delta, int stride) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4, rank = e.rank[slice];
    const u8* rows[kRuns];
    float d[kRuns][4] = {};
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
        const int at = (run + i * kExpandWarps) * kRunRows;
        rows[i] = at < count ? b_address(t, e, slice, n + at) + g * rank * 2 : nullptr;
    }
#pragma unroll 1
    for (int k = kColumns * c; k - kColumns * c < rank; k += 4 * kColumns) {
        Columns<kColumns> upper[kRuns], lower[kRuns];
#pragma unroll
        for (int i = 0; i < kRuns; ++i) {
            const int at = (run + i * kExpandWarps) * kRunRows + g;
            upper[i] = lower[i] = Columns<kColumns>{};
            if (at < count) upper[i] = load_columns<kColumns, kAligned>(rows[i], k, rank);
            if (at + 8 < count) lower[i] = load_columns<kColumns, kAligned>(rows[i] + 16 * rank, k, rank);
        }
#pragma unroll
        for (int j = 0; j < kColumns / 2; j += 2) {
            const Pair high = *reinterpret_cast<const Pair*>(&tile.high[g][k + 2 * j]);
            const Pair low = *reinterpret_cast<const Pair*>(&tile.low[g][k + 2 * j]);
#pragma unroll
            for (int i = 0; i < kRuns; ++i) {
                const u32 a0 = upper[i].pair[j], a1 = lower[i].pair[j], a2 = upper[i].pair[j + 1], a3 = lower[i].pair[j + 1];
                mma_bf16(d[i], a0, a1, a2, a3, high.x, high.y);
                mma_bf16(d[i], a0, a1, a2, a3, low.x, low.y);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
        const int at = (run + i * kExpandWarps) * kRunRows + g;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int token = 2 * c + j % 2, row = at + j / 2 * 8;
            if (token < group.count && row < count) delta[token * stride + row] = d[i][j];
        }
    }
}
#endif

// Fills delta[token][0, count) for outputs [n, n + count) of a slice; tile must be staged and a barrier passed.
__device__ __forceinline__ void expand_slice(const LoraTables& t, const OpEntry& e, const Group& group, int slice, int n,
                                             int count, const HiddenTile& tile, float* delta, int stride) {
#ifdef LORAPLEX_FP32
    const int rank = e.rank[slice];
    for (int row = threadIdx.x; row < count; row += kExpandThreads) {
        const float* b = reinterpret_cast<const float*>(b_address(t, e, slice, n + row));
        for (int token = 0; token < group.count; ++token) {
            float sum = 0.f;
            for (int k = 0; k < rank; ++k) sum += b[k] * tile.v[token][k];
            delta[token * stride + row] = sum;
        }
    }
#else
    const int warp = threadIdx.x / kWarp, rank = e.rank[slice];
    if (rank % 32 == 0) {
        for (int run = warp; run * kRunRows < count; run += 2 * kExpandWarps)
            expand_runs<2, 8, true>(t, e, group, slice, n, count, run, tile, delta, stride);
    } else if (rank % 4 == 0) {
        for (int run = warp; run * kRunRows < count; run += 4 * kExpandWarps)
            expand_runs<4, 4, true>(t, e, group, slice, n, count, run, tile, delta, stride);
    } else {
        for (int run = warp; run * kRunRows < count; run += kExpandWarps)
            expand_runs<1, 4, false>(t, e, group, slice, n, count, run, tile, delta, stride);
    }
#endif
}

// The whole sequence for one slice of an item: zeros where the adapter leaves this projection alone. Ends with a
// barrier: delta may be read by all, tile may be staged again.
__device__ __forceinline__ void expand_item(const LoraTables& t, const OpEntry* e, const ExpandParams& p,
                                            const Group& group, int slice, int n, int count, HiddenTile& tile,
                                            float* delta, int stride) {
    if (e == nullptr || e->rank[slice] == 0) {
        for (int i = threadIdx.x; i < group.count * count; i += kExpandThreads) delta[i / count * stride + i % count] = 0.f;
    } else {
        stage_hidden(p, *e, group, slice, tile);
        __syncthreads();
        expand_slice(t, *e, group, slice, n, count, tile, delta, stride);
    }
    __syncthreads();
}
