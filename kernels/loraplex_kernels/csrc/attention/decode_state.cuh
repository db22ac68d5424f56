// What a warp of the decode kernel keeps of its share of a context, and how scores become a part of it.
#pragma once
#include "attention/paged_kv.cuh"

constexpr int kWarps = 4;
constexpr int kHeads = 8;    // query heads per CTA: the N of mma.m16n8k16
constexpr int kTokens = 16;  // tokens of a warp in a round
constexpr int kBlocks = (kHeadDim + 31) / 32;

// Whether the eight dims 32 b + 8 c are part of a head.
__device__ __forceinline__ bool has_dims(int b, int c) { return kHeadDim % 32 == 0 || 32 * b + 8 * c < kHeadDim; }

// Running softmax over the tokens a warp has seen. Lane (g, c) holds heads 2c and 2c + 1; out[b][half][i] is dim
// first_dim(b, g / 2) + dim_of(2 half + i / 2, g % 2) of head 2c + i % 2.
struct State {
    float out[kBlocks][2][4];
    float peak[2];
    float sum[2];
};

// The share of one warp: tokens first, first + kWarps * kTokens, .. before stop, those before `begin` left out.
struct Share {
    const PagedKv& kv;
    int sequence, kv_head, begin, first, stop;
    float scale;  // exponent_scale()
};

// Makes probabilities of the scores of two tokens and two heads: p[i] is of head 2c + i % 2 and the token i / 2. They are less
// by a factor that the state keeps; out, whose turn it is then, has to shrink by `shrink`.
__device__ __forceinline__ void soften(float (&p)[4], bool live0, bool live1, float scale, State& state, float (&shrink)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = (i < 2 ? live0 : live1) ? exponent(p[i], scale) : negative_infinity();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float peak = fmaxf(p[h], p[h + 2]);
#pragma unroll
        for (int mask = 4; mask < kWarp; mask <<= 1) peak = fmaxf(peak, __shfl_xor_sync(kFullMask, peak, mask));
        peak = fmaxf(peak, state.peak[h]);
        const float base = peak == negative_infinity() ? 0.f : peak;
        shrink[h] = exp2f(state.peak[h] - base);
        state.peak[h] = peak;
        p[h] = exp2f(p[h] - base);
        p[h + 2] = exp2f(p[h + 2] - base);
        state.sum[h] = state.sum[h] * shrink[h] + p[h] + p[h + 2];
    }
}

__device__ __forceinline__ void shrink_out(State& state, int b, int half, const float (&shrink)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) state.out[b][half][i] *= shrink[i % 2];
}
