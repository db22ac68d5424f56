// out = softmax(scale * q K^T) V, causal, for chunks of new tokens against paged bf16 K and V, the chunk's own included.
//
// The query heads of one KV head are packed: row r of a chunk is query head r % group of token r / group, so a K/V tile
// in shared memory serves the whole group. Grid: (tiles, kv_heads); a tile is 64 packed rows of one chunk. Block: 4
// warps of 16 rows. K and V come in tiles of 64 tokens by cp.async, double-buffered, 16-byte chunks XOR-swizzled by row
// so that ldmatrix meets no bank conflict; q and the scores stay in registers.
// Shared memory: 4 x 64 x HEAD_DIM x 2 bytes (64 KiB at 128). Alignment: HEAD_DIM rows on 16 bytes.
// Registers: 2 CTAs of 128 threads per SM (3 would spill), hence at most 255. Architectures: sm_80 and up.
// Source: Dao, arXiv:2307.08691 (FlashAttention-2), algorithm 1 with its loop order.
#include "paged_kv.cuh"

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = 16 * kWarps;
constexpr int kTokens = 64;
constexpr int kChunks = kHeadDim / 8;  // 16-byte chunks of a K or V row
constexpr int kSteps = kHeadDim / 16;

// Rows [first_row, first_row + 64) of a chunk.
struct alignas(16) Tile {
    int sequence;
    int token_begin;  // row of the chunk's first token in q and out
    int start;        // its position
    int count;        // tokens of the chunk
    int first_row;
    int reserved[3];
};
static_assert(sizeof(Tile) == 32, "attention_prefill.py writes 32 bytes");

struct Params {
    PagedKv kv;
    const elem* q;  // [tokens, q_stride]: heads first
    elem* out;      // [tokens, num_heads * HEAD_DIM]
    const Tile* tiles;
    i64 q_stride;
};
static_assert(sizeof(Params) == 88, "params.py mirrors it");

struct Shared {
    u16 key[2][kTokens * kHeadDim];
    u16 value[2][kTokens * kHeadDim];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "attention_prefill.py asks for it");

__device__ __forceinline__ int swizzled(int row, int chunk) { return (row * kChunks + (chunk ^ (row & 7))) * 8; }

// Starts the copy of tokens [first, first + 64) of K and V; tokens past the end are zeroed.
__device__ __forceinline__ void load_tile(const PagedKv& kv, int sequence, int kv_head, int first, int end, u16* key, u16* value) {
    const int chunk = threadIdx.x % kChunks;
    const i64 plane = kv_plane(kv);
#pragma unroll
    for (int row = threadIdx.x / kChunks; row < kTokens; row += kThreads / kChunks) {
        const int token = first + row;
        const bool live = token < end;
        const elem* from = key_address(kv, page_of(kv, sequence, live ? token : end - 1), kv_head, token) + chunk * 8;
        copy_async16(key + swizzled(row, chunk), from, live);
        copy_async16(value + swizzled(row, chunk), from + plane, live);
    }
    copy_async_commit();
}

extern "C" __global__ void __launch_bounds__(kThreads, 2) attention_prefill(const Params p) {
    LORAPLEX_SHARED(Shared, shared);
    allow_dependents();
    dependency_wait();
    const Tile tile = p.tiles[blockIdx.x];
    const int kv_head = blockIdx.y, group = p.kv.num_heads / p.kv.num_kv_heads;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;

    // This lane's rows: g and g + 8 of the warp's 16.
    int position[2];
    i64 q_at[2], out_at[2];
    bool live[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = tile.first_row + warp * 16 + g + 8 * i, token = row / group, head = kv_head * group + row % group;
        live[i] = token < tile.count;
        position[i] = tile.start + min(token, tile.count - 1);
        q_at[i] = (tile.token_begin + token) * p.q_stride + head * kHeadDim;
        out_at[i] = (static_cast<i64>(tile.token_begin + token) * p.kv.num_heads + head) * kHeadDim;
    }
    u32 q[kSteps][4];
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // rows g, g + 8, then the same 8 columns further
            q[s][i] = live[i % 2] ? *reinterpret_cast<const u32*>(p.q + q_at[i % 2] + s * 16 + i / 2 * 8 + 2 * c) : 0u;
        }

    const int first_token = tile.first_row / group;
    const int last_token = min(tile.count - 1, (tile.first_row + kRows - 1) / group);
    const int end = tile.start + last_token + 1;
    const int begin = p.kv.window > 0 ? max(0, tile.start + first_token - p.kv.window + 1) / kTokens * kTokens : 0;
    const float scale = p.kv.scale * 1.4426950408889634f;
    float out[kHeadDim / 8][4] = {};
    float peak[2] = {negative_infinity(), negative_infinity()}, sum[2] = {};

    load_tile(p.kv, tile.sequence, kv_head, begin, end, shared.key[0], shared.value[0]);
    for (int first = begin, stage = 0; first < end; first += kTokens, stage ^= 1) {
        if (first + kTokens < end) {
            load_tile(p.kv, tile.sequence, kv_head, first + kTokens, end, shared.key[stage ^ 1], shared.value[stage ^ 1]);
            copy_async_wait<1>();
        } else {
            copy_async_wait<0>();
        }
        __syncthreads();
        const u16 *key = shared.key[stage], *value = shared.value[stage];

        // scores = q K^T
        float s[kTokens / 8][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
            for (int pair = 0; pair < kTokens / 16; ++pair) {
                u32 k[4];
                const int row = pair * 16 + lane / 16 * 8 + lane % 8, chunk = step * 2 + lane / 8 % 2;
                ldmatrix_x4(k, key + swizzled(row, chunk));
                mma_bf16(s[2 * pair], q[step][0], q[step][1], q[step][2], q[step][3], k[0], k[1]);
                mma_bf16(s[2 * pair + 1], q[step][0], q[step][1], q[step][2], q[step][3], k[2], k[3]);
            }

        // Mask, then the running softmax of rows g (i = 0) and g + 8 (i = 1).
        const bool is_edge = first + kTokens > tile.start + first_token || p.kv.window > 0;
#pragma unroll
        for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[n][i] *= scale;
                const int token = first + n * 8 + 2 * c + i % 2;
                const bool seen = token <= position[i / 2] && (p.kv.window == 0 || token > position[i / 2] - p.kv.window);
                if (is_edge && !seen) s[n][i] = negative_infinity();
            }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float higher = peak[i];
#pragma unroll
            for (int n = 0; n < kTokens / 8; ++n) higher = fmaxf(higher, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
            higher = fmaxf(higher, __shfl_xor_sync(kFullMask, higher, 1));
            higher = fmaxf(higher, __shfl_xor_sync(kFullMask, higher, 2));
            const float base = higher == negative_infinity() ? 0.f : higher;
            const float shrink = exp2f(peak[i] - base);
            peak[i] = higher;
            sum[i] *= shrink;
#pragma unroll
            for (int n = 0; n < kTokens / 8; ++n) {
                s[n][2 * i] = exp2f(s[n][2 * i] - base);
                s[n][2 * i + 1] = exp2f(s[n][2 * i + 1] - base);
                sum[i] += s[n][2 * i] + s[n][2 * i + 1];
            }
#pragma unroll
            for (int n = 0; n < kHeadDim / 8; ++n) {
                out[n][2 * i] *= shrink;
                out[n][2 * i + 1] *= shrink;
            }
        }

        // out += p V; the scores' fragments are p's as they lie.
#pragma unroll
        for (int step = 0; step < kTokens / 16; ++step) {
            const u32 a0 = pack_bf16(s[2 * step][0], s[2 * step][1]), a1 = pack_bf16(s[2 * step][2], s[2 * step][3]);
            const u32 a2 = pack_bf16(s[2 * step + 1][0], s[2 * step + 1][1]);
            const u32 a3 = pack_bf16(s[2 * step + 1][2], s[2 * step + 1][3]);
#pragma unroll
            for (int pair = 0; pair < kHeadDim / 16; ++pair) {
                u32 v[4];
                const int row = step * 16 + lane / 8 % 2 * 8 + lane % 8, chunk = pair * 2 + lane / 16;
                ldmatrix_x4_trans(v, value + swizzled(row, chunk));
                mma_bf16(out[2 * pair], a0, a1, a2, a3, v[0], v[1]);
                mma_bf16(out[2 * pair + 1], a0, a1, a2, a3, v[2], v[3]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        sum[i] += __shfl_xor_sync(kFullMask, sum[i], 1);
        sum[i] += __shfl_xor_sync(kFullMask, sum[i], 2);
        if (!live[i]) continue;
        const float inverse = 1.f / sum[i];
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
            *reinterpret_cast<u32*>(p.out + out_at[i] + n * 8 + 2 * c) =
                pack_bf16(out[n][2 * i] * inverse, out[n][2 * i + 1] * inverse);
        }
    }
}
