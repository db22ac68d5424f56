// One head of one token by one warp: qk-norm, rotary embedding (rotate-half), and where its K or V goes.
#pragma once
#include "common.cuh"

constexpr int kHeadDim = HEAD_DIM;
constexpr int kPairs = kHeadDim / 2 / kWarp;  // (i, i + HEAD_DIM / 2) pairs per lane, lane l holding i = l * kPairs...
static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256, "a warp holds a head as whole pairs");

struct RopeParams {
    elem* qkv;              // [tokens, (heads + 2 * kv_heads) * HEAD_DIM]; q is rotated in place
    const float* rotary;    // [positions][HEAD_DIM]: cosines, then sines, HEAD_DIM / 2 each
    const int* positions;   // [tokens]
    const int* kv_slots;    // [tokens]: page * block_tokens + token in page; -1: K and V are not kept
    u8* pool;
    const elem* q_norm;     // [HEAD_DIM] or null
    const elem* k_norm;
    const float* delta;     // LoRA's, as qkv; or null
    i64 page_bytes;
    i64 layer_offset;       // bytes from a page's start to this layer's K
    int num_heads;
    int num_kv_heads;
    int block_tokens;
    float norm_eps;
};
static_assert(sizeof(RopeParams) == 96, "params.py mirrors it");

// Where head `head` (0..kv_heads K, then kv_heads V) of a KV slot lies: [layer][K|V][kv_head][token][dim].
__device__ __forceinline__ elem* kv_address(const RopeParams& p, int slot, int head) {
    const i64 page = slot / p.block_tokens, token = slot % p.block_tokens;
    const i64 row = static_cast<i64>(head) * p.block_tokens + token;
    return reinterpret_cast<elem*>(p.pool + page * p.page_bytes + p.layer_offset) + row * kHeadDim;
}

// Finishes head `head` of the fused [q | k | v] row of `token`; low/high hold its pairs, delta added.
__device__ __forceinline__ void finish_head(const RopeParams& p, int token, int head, float (&low)[kPairs],
                                            float (&high)[kPairs]) {
    const int lane = threadIdx.x % kWarp;
    const bool is_q = head < p.num_heads, is_v = head >= p.num_heads + p.num_kv_heads;
    const elem* norm = is_q ? p.q_norm : is_v ? nullptr : p.k_norm;
    if (norm) {
        float squares = 0.f;
#pragma unroll
        for (int j = 0; j < kPairs; ++j) squares += low[j] * low[j] + high[j] * high[j];
        const float scale = rsqrtf(warp_sum(squares) / kHeadDim + p.norm_eps);
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
            const int i = lane * kPairs + j;
            low[j] = rounded(to_float(norm[i]) * rounded(low[j] * scale));
            high[j] = rounded(to_float(norm[i + kHeadDim / 2]) * rounded(high[j] * scale));
        }
    }
    if (!is_v) {
        const float* rotary = p.rotary + static_cast<i64>(p.positions[token]) * kHeadDim;
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
            const int i = lane * kPairs + j;
            const float cosine = rotary[i], sine = rotary[i + kHeadDim / 2];
            const float a = low[j], b = high[j];
            low[j] = a * cosine - b * sine;
            high[j] = b * cosine + a * sine;
        }
    }
    elem* to;
    if (is_q) {
        to = p.qkv + (static_cast<i64>(token) * (p.num_heads + 2 * p.num_kv_heads) + head) * kHeadDim;
    } else {
        const int slot = p.kv_slots[token];
        if (slot < 0) return;
        to = kv_address(p, slot, head - p.num_heads);
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
        to[lane * kPairs + j] = from_float<elem>(low[j]);
        to[lane * kPairs + j + kHeadDim / 2] = from_float<elem>(high[j]);
    }
}
