// What fp8_product.cu makes of its sums: scales, bias and, with GATED, gate and up. Source: silu_mul.cu.
#pragma once
#include "products/fp8_product.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LORAPLEX_HOST)

// This CTA's share of the cluster's results: four neighbouring columns of a row a thread and turn.
constexpr u32 kQuads = kColumns / 4;
constexpr u32 kTurns = (kRows * kQuads + kCluster * kThreads - 1) / (kCluster * kThreads);
struct Place {
    u32 row, column;
    bool live;
};
__device__ __forceinline__ Place place_of(const Params& p, const Share& share, u32 turn) {
    const u32 index = (turn * kCluster + share.rank) * kThreads + threadIdx.x, row = index / kQuads,
              column = index % kQuads * 4;
    return {row, column, row < p.rows && share.first_column + column < p.outputs};
}

using Results = float[kTurns][kSides][4];

// All reads of other CTAs' memory are on their way before the first is waited for.
__device__ __forceinline__ void read_sums(const Params& p, const Share& share, const Shared& shared, Results& v) {
#pragma unroll
    for (u32 turn = 0; turn < kTurns; ++turn) {
        const Place at = place_of(p, share, turn);
        if (!at.live) continue;
#pragma unroll
        for (u32 rank = 0; rank < kCluster; ++rank) {
#pragma unroll
            for (u32 part = 0; part < kParts; ++part) {
#pragma unroll
                for (u32 side = 0; side < kSides; ++side) {
                    const float& first = shared.sums[part][at.row][side * kColumns + at.column];
                    const Quad q = load_peer<kCluster>(address_of(&first), rank);
                    float (&sum)[4] = v[turn][side];
                    sum[0] += __uint_as_float(q.x), sum[1] += __uint_as_float(q.y);
                    sum[2] += __uint_as_float(q.z), sum[3] += __uint_as_float(q.w);
                }
            }
        }
    }
}

// A sum that is whole, with its scales and bias.
__device__ __forceinline__ float scaled(const Shared& shared, float sum, u32 row, u32 output) {
    return sum * (shared.row_scales[row] * shared.output_scales[output]) + shared.bias[output];
}

#ifdef GATED
static_assert(kWarp % kQuads == 0 && kThreads % kQuads == 0, "a row's columns lie in one warp");

__device__ __forceinline__ void write_results(const Params& p, const Share& share, const Shared& shared, const Results& v) {
#pragma unroll
    for (u32 turn = 0; turn < kTurns; ++turn) {
        const Place at = place_of(p, share, turn);
        elem result[4] = {};
        float largest = 0.f;
        if (at.live) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const float gate = rounded(scaled(shared, v[turn][0][i], at.row, at.column + i));
                const float up = rounded(scaled(shared, v[turn][1][i], at.row, at.column + i + kColumns));
                result[i] = from_float<elem>(gated(gate, up));
                largest = fmaxf(largest, fabsf(to_float(result[i])));
            }
            *reinterpret_cast<Pair*>(p.y + static_cast<i64>(at.row) * p.outputs + share.first_column + at.column) =
                *reinterpret_cast<const Pair*>(result);
        }
#pragma unroll
        for (u32 mask = kQuads / 2; mask > 0; mask >>= 1) largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, mask));
        const i64 tiles = (p.outputs + kColumns - 1) / kColumns;
        if (!kBlocks && kScaled && at.column == 0 && at.live)
            p.maxima[at.row * tiles + share.first_column / kColumns] = largest;
    }
}
#else
__device__ __forceinline__ void write_results(const Params& p, const Share& share, const Shared& shared, const Results& v) {
#pragma unroll
    for (u32 turn = 0; turn < kTurns; ++turn) {
        const Place at = place_of(p, share, turn);
        if (!at.live) continue;
        Pair& y = *reinterpret_cast<Pair*>(p.y + static_cast<i64>(at.row) * p.outputs + share.first_column + at.column);
        const Pair before = p.accumulates ? y : Pair{0, 0};
        const float old[4] = {low_float(before.x), high_float(before.x), low_float(before.y), high_float(before.y)};
        float result[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) result[i] = scaled(shared, v[turn][0][i], at.row, at.column + i) + old[i];
        y = Pair{pack_bf16(result[0], result[1]), pack_bf16(result[2], result[3])};
    }
}
#endif

#endif
