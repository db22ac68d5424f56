// delta[t][n] = scaling * scale[t] * (sum over planes of h[plane][t]) * B^T for a run of outputs of one slice, left in
// shared memory as fp32 for the pointwise work that follows: the second half of LoRA at decode.
//
// Work item: (group of <= 8 tokens, run of outputs): begin = first output in the op's fused outputs, extent = how many;
// a run stays within a slice and starts on a multiple of 16. items.py sizes runs by bytes, so a rank-64 adapter's runs
// are a quarter as long as a rank-16 adapter's.
// bf16: the run's B is copied to shared memory as it lies in its tile (cp.async, issued before anything is waited for:
// up to 32 KiB in flight per CTA), then mma.m16n8k16 with outputs as M, rank as K, tokens as N. h is split into two bf16
// (high + low), so the product keeps the fp32 precision of h at the price of idle tensor cores.
// fp32: scalar FMAs on B in global memory. Block: 8 warps; each takes every eighth run of 16 outputs.
#pragma once
#include "lora_table.cuh"

constexpr int kExpandThreads = 256;
constexpr int kExpandWarps = kExpandThreads / kWarp;
constexpr int kRunRows = 16;   // outputs per mma
constexpr int kWeightBytes = sizeof(elem) == 2 ? 32 * 1024 : 16;  // of B staged per CTA; fp32 stages none
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

// Outputs of a slice that fit the staging buffer, whole mma runs.
__device__ __forceinline__ int staged_outputs(const OpEntry& e, int slice, int bytes) {
    return bytes / (e.rank[slice] * static_cast<int>(sizeof(elem))) / kRunRows * kRunRows;
}

// Starts the copy of rows [n, n + count) of a slice's B: neighbouring rows of a tile are contiguous. Runs start on a
// multiple of 16 outputs and end on one of 8, so every piece is whole 16-byte vectors whatever the rank.
__device__ __forceinline__ void stage_weights(const LoraTables& t, const OpEntry& e, int slice, int n, int count, u8* to) {
#ifndef LORAPLEX_FP32
    const int row_bytes = e.rank[slice] * 2, step = e.b_step[slice];
    const i64* tiles = t.tiles + e.b_first[slice] + n / step;
    for (int row = n % step; count > 0; ++tiles, row = 0) {
        const int rows = min(count, step - row), bytes = rows * row_bytes;
        const u8* from = t.pool + *tiles + row * row_bytes;
        for (int byte = threadIdx.x * 16; byte < bytes; byte += kExpandThreads * 16) copy_async16(to + byte, from + byte, true);
        to += bytes;
        count -= rows;
    }
    copy_async_commit();
#endif
}

// Sums the planes of the group's h for one slice and scales, a warp per token; columns up to the next multiple of 16 and
// tokens the group does not have are zeroed.
__device__ __forceinline__ void stage_hidden(const ExpandParams& p, const OpEntry& e, const Group& group, int slice,
                                             HiddenTile& tile) {
    static_assert(kExpandWarps == kGroupTokens, "a warp per token");
    const int rank = e.rank[slice], t = threadIdx.x / kWarp, token = group.tokens[t];
    const float* row = p.h + static_cast<i64>(token) * p.h_stride + first_rank_row(e, slice);
    const float scale = t < group.count ? e.scaling[slice] * p.scale[token] : 0.f;
    for (int r = threadIdx.x % kWarp; r < (rank + 15) / 16 * 16; r += kWarp) {
        float v = 0.f;
        if (t < group.count && r < rank) {
            const float* from = row + r;
            int plane = 0;
            for (; plane + 4 <= p.num_planes; plane += 4, from += 4 * p.h_plane) {  // four loads in flight
                const float a = from[0], b = from[p.h_plane], c = from[2 * p.h_plane], d = from[3 * p.h_plane];
                v = (((v + a) + b) + c) + d;
            }
            for (; plane < p.num_planes; ++plane, from += p.h_plane) v += from[0];
            v *= scale;
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
// Four elements of a staged row from column k on, zero past the rank; one read where the rank keeps rows aligned.
template <bool kAligned>
__device__ __forceinline__ Pair read_row4(const u8* row, int k, int rank) {
    Pair q = {};
    if constexpr (kAligned) {
        if (k < rank) q = *reinterpret_cast<const Pair*>(row + 2 * k);
    } else {
        const u16* from = reinterpret_cast<const u16*>(row);
        if (k < rank) q.x = from[k];
        if (k + 1 < rank) q.x |= static_cast<u32>(from[k + 1]) << 16;
        if (k + 2 < rank) q.y = from[k + 2];
        if (k + 3 < rank) q.y |= static_cast<u32>(from[k + 3]) << 16;
    }
    return q;
}

// Runs of 16 outputs, every eighth, by one warp, four at a time so that they share the reads of h. Lane (g, c) reads
// columns 4c.. of rows g and g + 8 of a step of 16.
template <bool kAligned>
__device__ __forceinline__ void expand_runs(int rank, const Group& group, int count, const u8* weights,
                                            const HiddenTile& tile, float* delta, int stride) {
    constexpr int kRuns = 4, kApart = kExpandWarps * kRunRows;
    const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
    for (int first = threadIdx.x / kWarp * kRunRows; first < count; first += kRuns * kApart) {
        const u8* row = weights + (first + g) * rank * 2;
        float d[kRuns][4] = {};
#pragma unroll 1
        for (int k = 4 * c; k - 4 * c < rank; k += 16) {
            const Pair high = *reinterpret_cast<const Pair*>(&tile.high[g][k]);
            const Pair low = *reinterpret_cast<const Pair*>(&tile.low[g][k]);
#pragma unroll
            for (int i = 0; i < kRuns; ++i) {
                if (first + i * kApart >= count) break;  // counts are multiples of 8
                const Pair a = read_row4<kAligned>(row + i * kApart * rank * 2, k, rank);
                Pair b = {};
                if (first + i * kApart + 8 < count) b = read_row4<kAligned>(row + (i * kApart + 8) * rank * 2, k, rank);
                mma_bf16(d[i], a.x, b.x, a.y, b.y, high.x, high.y);
                mma_bf16(d[i], a.x, b.x, a.y, b.y, low.x, low.y);
            }
        }
        if (2 * c >= group.count) continue;
        float* to = delta + 2 * c * stride + first + g;
#pragma unroll
        for (int i = 0; i < kRuns; ++i) {
            if (first + i * kApart < count) to[i * kApart] = d[i][0];
            if (first + i * kApart + 8 < count) to[i * kApart + 8] = d[i][2];
            if (2 * c + 1 >= group.count) continue;
            if (first + i * kApart < count) to[stride + i * kApart] = d[i][1];
            if (first + i * kApart + 8 < count) to[stride + i * kApart + 8] = d[i][3];
        }
    }
}
#endif

// Fills delta[token][0, count) for outputs [n, n + count) of a slice from B staged in weights (fp32: from the pool).
__device__ __forceinline__ void expand_slice(const LoraTables& t, const OpEntry& e, const Group& group, int slice, int n,
                                             int count, const u8* weights, const HiddenTile& tile, float* delta,
                                             int stride) {
    const int rank = e.rank[slice];
#ifdef LORAPLEX_FP32
    for (int row = threadIdx.x; row < count; row += kExpandThreads) {
        const float* b = reinterpret_cast<const float*>(b_address(t, e, slice, n + row));
        for (int token = 0; token < group.count; ++token) {
            float sum = 0.f;
            for (int k = 0; k < rank; ++k) sum += b[k] * tile.v[token][k];
            delta[token * stride + row] = sum;
        }
    }
#else
    if (rank % 4 == 0) {
        expand_runs<true>(rank, group, count, weights, tile, delta, stride);
    } else {
        expand_runs<false>(rank, group, count, weights, tile, delta, stride);
    }
#endif
}

// The whole sequence for one slice of an item, whose first staged_outputs() of B stage_weights() has on their way; zeros
// where the adapter leaves this projection alone. Ends with a barrier: delta may be read by all, buffers used again.
__device__ __forceinline__ void expand_item(const LoraTables& t, const OpEntry* e, const ExpandParams& p,
                                            const Group& group, int slice, int n, int count, u8* weights, int bytes,
                                            HiddenTile& tile, float* delta, int stride) {
    if (e == nullptr || e->rank[slice] == 0) {
        for (int i = threadIdx.x; i < group.count * count; i += kExpandThreads) delta[i / count * stride + i % count] = 0.f;
        __syncthreads();
        return;
    }
    stage_hidden(p, *e, group, slice, tile);
#ifdef LORAPLEX_FP32
    __syncthreads();
    expand_slice(t, *e, group, slice, n, count, weights, tile, delta, stride);
    __syncthreads();
#else
    const int staged = staged_outputs(*e, slice, bytes);
    for (int done = 0; done < count; done += staged) {
        const int part = min(staged, count - done);
        if (done > 0) stage_weights(t, *e, slice, n + done, part, weights);
        copy_async_wait<0>();
        __syncthreads();
        expand_slice(t, *e, group, slice, n + done, part, weights, tile, delta + done, stride);
        __syncthreads();
    }
#endif
}

// Starts the copy of the weights of a run: what a kernel does first with an item, before it waits for anything.
__device__ __forceinline__ void begin_item(const LoraTables& t, const OpEntry* e, int slice, int n, int count, u8* weights,
                                           int bytes) {
#ifndef LORAPLEX_FP32
    if (e == nullptr || e->rank[slice] == 0) return;
    stage_weights(t, *e, slice, n, min(count, staged_outputs(*e, slice, bytes)), weights);
#endif
}
