// A warp's share of a context over e4m3 K and V. Half the bytes are half as long under way, and making bf16 of them takes time, so
// a lane asks for the next K as soon as it is done with K, and for the next V as soon as it is done with V: what is loaded
// always waits behind what is computed, in the same registers. V is transposed as bytes, which halves the movmatrix.
#pragma once
#include "attention/decode_state.cuh"

// The dim of a pair and half of the eight that a lane has of a token; pairs are as widen4() gives them.
__device__ __forceinline__ int dim_of(int pair, int half) { return pair / 2 * 4 + pair % 2 + 2 * half; }
__device__ __forceinline__ Quad ordered(const Quad& q) {
    return {q.x & 0xffffu | q.y << 16, q.x >> 16 | q.y & 0xffff0000u, q.z & 0xffffu | q.w << 16, q.z >> 16 | q.w & 0xffff0000u};
}

// The first of the eight dims of a head that a lane has in block b. A load brings 16 bytes, hence two blocks' dims, as the order
// of k is free: loads of 8 bytes ask the L2 for twice as many parts of a line. Where rows are not whole lines, they are 8.
constexpr bool kHasWideLoads = kHeadDim % 64 == 0;
__device__ __forceinline__ int first_dim(int b, int c) {
    return kHasWideLoads ? 64 * (b / 2) + 16 * c + 8 * (b % 2) : 32 * b + 8 * c;
}

// Two tokens of a lane, t + g and t + g + 8: where their K is, null without one, and their scales.
struct TokenPair {
    const u8* from[2];
    u32 scales[2];

    __device__ __forceinline__ bool live(int i) const { return from[i] != nullptr; }
};
__device__ __forceinline__ bool is_live(const Share& share, int token) { return token >= share.begin && token < share.stop; }

struct PagePair {
    int id[2];
};
__device__ __forceinline__ PagePair find_pages(const Share& share, int t, int g) {
    PagePair pages = {};
#pragma unroll
    for (int i = 0; i < 2; ++i)
        if (is_live(share, t + g + 8 * i)) pages.id[i] = page_of(share.kv, share.sequence, t + g + 8 * i);
    return pages;
}
__device__ __forceinline__ TokenPair find_tokens(const Share& share, const PagePair& pages, int t, int g, int c) {
    TokenPair pair = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int token = t + g + 8 * i;
        if (!is_live(share, token)) continue;
        pair.from[i] = key_address(share.kv, pages.id[i], share.kv_head, token) + first_dim(0, c);
        pair.scales[i] = *scale_address(share.kv, pages.id[i], share.kv_head, token);
    }
    return pair;
}

__device__ __forceinline__ void load_row(const u8* from, i64 plane, int c, Pair (&to)[kBlocks]) {
    const bool live = from != nullptr;
    if constexpr (kHasWideLoads) {
#pragma unroll
        for (int b = 0; b < kBlocks; b += 2) {
            const Quad both = live ? load_weights16(from + plane + 32 * b) : Quad{};
            to[b] = {both.x, both.y}, to[b + 1] = {both.z, both.w};
        }
    } else {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) to[b] = live && has_dims(b, c) ? load_weights8(from + plane + 32 * b) : Pair{};
    }
}
__device__ __forceinline__ void load_pair(const TokenPair& pair, i64 plane, int c, Pair (&to)[2][kBlocks]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) load_row(pair.from[i], plane, c, to[i]);
}

__device__ __forceinline__ Quad widened(const Pair& raw, u32 multiplier) {
    Quad quad;
    widen4(raw.x, multiplier, quad.x, quad.y);
    widen4(raw.y, multiplier, quad.z, quad.w);
    return quad;
}

__device__ __forceinline__ void score(const Pair (&k)[2][kBlocks], const TokenPair& tokens, const Quad (&q)[kBlocks],
                                      float (&s)[4]) {
    const u32 multipliers[2] = {multiplier_of(tokens.scales[0] & 0xffffu), multiplier_of(tokens.scales[1] & 0xffffu)};
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
        const Quad first = widened(k[0][b], multipliers[0]), second = widened(k[1][b], multipliers[1]);
        mma_bf16(s, first.x, second.x, first.y, second.y, q[b].x, q[b].y);
        mma_bf16(s, first.z, second.z, first.w, second.w, q[b].z, q[b].w);
    }
}

// The factors of V of tokens 2c (low) and 2c + 1 of eight, from the lanes that have their scales.
__device__ __forceinline__ u32 value_multipliers(u32 scales, int c) {
    const u32 own = multiplier_of(scales >> 16);
    const u32 low = __shfl_sync(kFullMask, own, 8 * c), high = __shfl_sync(kFullMask, own, 8 * c + 4);
    return low & 0xffffu | high & 0xffff0000u;
}

__device__ __forceinline__ void add_values(const Pair (&v)[2][kBlocks], const TokenPair& tokens, const float (&p)[4], int c,
                                           State& state) {
    const u32 multipliers[2] = {value_multipliers(tokens.scales[0], c), value_multipliers(tokens.scales[1], c)};
    const u32 p0 = transpose_8x8(pack_bf16(p[0], p[1])), p1 = transpose_8x8(pack_bf16(p[2], p[3]));
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // a unit of the transposition is two dims of a token
            u32 a[4];
            widen4(transpose_8x8(half ? v[0][b].y : v[0][b].x), multipliers[0], a[0], a[1]);
            widen4(transpose_8x8(half ? v[1][b].y : v[1][b].x), multipliers[1], a[2], a[3]);
            mma_bf16(state.out[b][half], a[0], a[1], a[2], a[3], p0, p1);
        }
}

__device__ __forceinline__ void attend(const Share& share, const Quad (&q)[kBlocks], int g, int c, State& state) {
    constexpr int kStep = kWarps * kTokens;
    const i64 plane = kv_plane(share.kv);
    Pair k[2][kBlocks], v[2][kBlocks];
    TokenPair tokens = find_tokens(share, find_pages(share, share.first, g), share.first, g, c);
    PagePair pages = find_pages(share, share.first + kStep, g);
    load_pair(tokens, 0, c, k);
    load_pair(tokens, plane, c, v);
#pragma unroll 1
    for (int t = share.first; t < share.stop; t += kStep) {
        float p[4] = {}, shrink[2];
        score(k, tokens, q, p);
        const TokenPair next = find_tokens(share, pages, t + kStep, g, c);
        load_pair(next, 0, c, k);
        pages = find_pages(share, t + 2 * kStep, g);
        soften(p, tokens.live(0), tokens.live(1), share.scale, state, shrink);
        if (__any_sync(kFullMask, shrink[0] != 1.f || shrink[1] != 1.f)) {  // seldom, but for the first tokens
#pragma unroll
            for (int i = 0; i < 2 * kBlocks; ++i) shrink_out(state, i / 2, i % 2, shrink);
        }
        add_values(v, tokens, p, c, state);
        load_pair(next, plane, c, v);
        tokens = next;
    }
}
