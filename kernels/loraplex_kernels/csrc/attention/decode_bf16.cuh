// A warp's share of a context over bf16 K and V: its 16-byte loads are mma fragments as they arrive, K's because the order of k
// is free, V's after movmatrix.
#pragma once
#include "attention/decode_state.cuh"

// The first of the eight dims of a head that a lane has in block b.
__device__ __forceinline__ int first_dim(int b, int c) { return 32 * b + 8 * c; }
// The dim of a pair and half of the eight that a lane has of a token.
__device__ __forceinline__ int dim_of(int pair, int half) { return 2 * pair + half; }
__device__ __forceinline__ Quad ordered(const Quad& q) { return q; }

__device__ __forceinline__ void accumulate(const Quad (&k)[2][kBlocks], const Quad (&v)[2][kBlocks], const Quad (&q)[kBlocks],
                                           bool live0, bool live1, float scale, State& state) {
    float p[4] = {};
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
        mma_bf16(p, k[0][b].x, k[1][b].x, k[0][b].y, k[1][b].y, q[b].x, q[b].y);
        mma_bf16(p, k[0][b].z, k[1][b].z, k[0][b].w, k[1][b].w, q[b].z, q[b].w);
    }
    float shrink[2];
    soften(p, live0, live1, scale, state, shrink);
    const u32 p0 = transpose_8x8(pack_bf16(p[0], p[1])), p1 = transpose_8x8(pack_bf16(p[2], p[3]));
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            shrink_out(state, b, half, shrink);
            const u32 a0 = transpose_8x8(half ? v[0][b].z : v[0][b].x), a1 = transpose_8x8(half ? v[0][b].w : v[0][b].y);
            const u32 a2 = transpose_8x8(half ? v[1][b].z : v[1][b].x), a3 = transpose_8x8(half ? v[1][b].w : v[1][b].y);
            mma_bf16(state.out[b][half], a0, a1, a2, a3, p0, p1);
        }
    }
}

__device__ __forceinline__ void attend(const Share& share, const Quad (&q)[kBlocks], int g, int c, State& state) {
    const i64 plane = kv_plane(share.kv);
    for (int t = share.first; t < share.stop; t += kWarps * kTokens) {
        Quad k[2][kBlocks], v[2][kBlocks];
        bool live[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = t + g + 8 * i;
            live[i] = token >= share.begin && token < share.stop;
            const elem* from = nullptr;
            if (live[i]) {
                const int page = page_of(share.kv, share.sequence, token);
                from = key_address(share.kv, page, share.kv_head, token) + 8 * c;
            }
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                k[i][b] = v[i][b] = Quad{};
                if (live[i] && has_dims(b, c)) {
                    k[i][b] = load_weights16(reinterpret_cast<const u8*>(from + 32 * b));
                    v[i][b] = load_weights16(reinterpret_cast<const u8*>(from + plane + 32 * b));
                }
            }
        }
        accumulate(k, v, q, live[0], live[1], share.scale, state);
    }
}
