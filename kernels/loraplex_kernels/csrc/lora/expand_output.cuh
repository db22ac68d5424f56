// What the expand kernels are told, and what becomes of a block's delta: added to y, or written.
#pragma once
#include "lora/expand.cuh"

struct Params {
    LoraTables lora;
    ExpandParams expand;
    elem* y;       // [tokens, y_stride]
    float* delta;  // [tokens, y_stride], or null: y is written
    i64 y_stride;
    int accumulates;  // y is added to
    int reserved;
};
static_assert(sizeof(Params) == 136, "params.py mirrors it");

// Where a lane's outputs of an item's first block of its warp are: elements of y or delta, negative without a token.
struct Target {
    i64 at[2];
};
__device__ __forceinline__ Target find_target(const Params& p, const Group& group, int n) {
    Target target;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        const int token = lane_token(group, which);
        target.at[which] = token < 0 ? -1 : token * p.y_stride + n + lane_row();
    }
    return target;
}

// A lane's part of y of a block, asked for before the product: two tokens' eight outputs.
struct Before {
    Octet tokens[2];
};
__device__ __forceinline__ Before load_before(const Params& p, const Target& target, int n, int rows) {
    Before before = {};
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        if (p.accumulates && target.at[which] >= 0 && lane_row() < rows)
            before.tokens[which] = load_octet(p.y + target.at[which] + n);
    }
    return before;
}

__device__ __forceinline__ void prefetch_before(const Params& p, const Target& target, int n, int rows) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        if (p.accumulates && target.at[which] >= 0 && lane_row() < rows) prefetch_to_l1(p.y + target.at[which] + n);
    }
}

__device__ __forceinline__ void store_block(const Params& p, const Target& target, int n, int rows, const Before& before,
                                            const Delta& delta) {
    if (lane_row() >= rows) return;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        const i64 at = target.at[which] + n;
        if (target.at[which] < 0) continue;
        if (p.delta == nullptr) {
            store_octet(p.y + at, sum_octet(before.tokens[which], delta, which));
        } else {
#pragma unroll
            for (int j = 0; j < kLaneRows; j += 4) {
                const float* v = delta.v[which] + j;
                *reinterpret_cast<Quad*>(p.delta + at + j) = {__float_as_uint(v[0]), __float_as_uint(v[1]),
                                                              __float_as_uint(v[2]), __float_as_uint(v[3])};
            }
        }
    }
}
