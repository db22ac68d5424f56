// out = softmax(scale * q K^T) V, causal, for chunks of new tokens against paged bf16 K and V, the chunk's own included.
//
// The query heads of one KV head are packed: row r of a chunk is query head r % group of token r / group, so a K/V tile
// in shared memory serves the whole group. Grid: (kv_heads, tiles), so that all heads of a long tile start before any of
// a short one; a tile is 128 packed rows of one chunk. Block: 4 warps of 32 rows, so that each fragment of K and V
// serves two mma. K and V come in tiles of 64 tokens by cp.async, double-buffered, their page ids one tile earlier;
// 16-byte chunks are XOR-swizzled by row (heads of 80 and 96: rows are one chunk further apart) so that ldmatrix meets no
// bank conflict. q stays in shared memory, the scores in registers. Masks are applied where the diagonal or the window cuts a tile; warps skip tiles that none of their rows
// sees.
// Heads of 256: 8 warps of 16 rows, as a warp's sums of 32 would take all registers, and tiles of 32 tokens, or of 16 where
// a CTA has less shared memory than 128 KiB (sm_86, sm_89).
// Shared memory: (128 + 4 x 64) x HEAD_DIM x 2 bytes (96 KiB at 128). Alignment: HEAD_DIM rows on 16 bytes.
// Registers: 2 CTAs of 128 threads per SM by shared memory, 1 of 256 for heads of 256, hence at most 255.
// Architectures: sm_80 and up.
// Source: Dao, arXiv:2307.08691 (FlashAttention-2), algorithm 1 with its loop order.
#include "attention/prefill_tile.cuh"

constexpr int kSteps = kHeadDim / 16;

// Rows [first_row, first_row + 128) of a chunk.
struct alignas(16) Tile {
    int sequence;
    int token_begin;  // row of the chunk's first token in q and out
    int start;        // position of that token in its sequence
    int count;        // tokens of the chunk
    int first_row;
    int reserved[3];
};
static_assert(sizeof(Tile) == 32, "attention/prefill.py writes 32 bytes");

struct Params {
    PagedKv kv;
    const elem* q;  // [tokens, q_stride]: heads first
    elem* out;      // [tokens, num_heads * HEAD_DIM]
    const Tile* tiles;
    i64 q_stride;
};
static_assert(sizeof(Params) == 88, "params.py mirrors it");

// Starts the copy of the tile's rows of q; rows past the chunk are zeroed.
__device__ __forceinline__ void load_q(const Params& p, const Tile& tile, int kv_head, int group, u16* q) {
    const auto copy = [&](int row, int chunk) {
        const int token = (tile.first_row + row) / group, head = kv_head * group + (tile.first_row + row) % group;
        const bool live = token < tile.count;
        const elem* from = p.q + (tile.token_begin + (live ? token : 0)) * p.q_stride + head * kHeadDim + chunk * 8;
        copy_async16(q + swizzled(row, chunk), from, live);
    };
    if constexpr (kHasOwnChunk) {
        const int chunk = threadIdx.x % kChunks;
#pragma unroll 4
        for (int row = threadIdx.x / kChunks; row < kRows; row += kRowStep) copy(row, chunk);
    } else {
#pragma unroll 4
        for (int at = threadIdx.x; at < kRows * kChunks; at += kThreads) copy(at / kChunks, at % kChunks);
    }
}

// The running softmax of a warp's 32 rows; this lane has rows g and g + 8 of each block of 16.
struct Rows {
    float out[kM][kHeadDim / 8][4];
    float peak[kM][2], sum[kM][2];

    // scores = q K^T of a tile's tokens.
    __device__ __forceinline__ void score(float (&s)[kM][kTokens / 8][4], const u16* q, const u16* key, int warp,
                                          int lane) const {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            u32 a[kM][4];
#pragma unroll
            for (int m = 0; m < kM; ++m)
                ldmatrix_x4(a[m], q + swizzled((warp * kM + m) * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
            for (int pair = 0; pair < kTokens / 16; ++pair) {
                u32 k[4];
                ldmatrix_x4(k, key + swizzled(pair * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
                for (int m = 0; m < kM; ++m) {
                    mma_bf16(s[m][2 * pair], a[m][0], a[m][1], a[m][2], a[m][3], k[0], k[1]);
                    mma_bf16(s[m][2 * pair + 1], a[m][0], a[m][1], a[m][2], a[m][3], k[2], k[3]);
                }
            }
        }
    }
    __device__ __forceinline__ void cap(float (&s)[kM][kTokens / 8][4], float scale) const {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) s[m][n][i] = exponent(s[m][n][i], scale);
    }
    __device__ __forceinline__ void mask(float (&s)[kM][kTokens / 8][4], int first, int window, const Tile& tile, int first_row,
                                         int group, int lane) const {
        int position[kM][2];
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                position[m][i] = tile.start + min((first_row + m * 16 + i * 8 + lane / 4) / group, tile.count - 1);
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int token = first + n * 8 + lane % 4 * 2 + i % 2, last = position[m][i / 2];
                    if (token > last || (window > 0 && token <= last - window)) s[m][n][i] = negative_infinity();
                }
    }
    // Turns scores into weights relative to the new maxima, and rescales the sums taken relative to the old ones.
    __device__ __forceinline__ void weigh(float (&s)[kM][kTokens / 8][4], float scale) {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float higher = peak[m][i];
#pragma unroll
                for (int n = 0; n < kTokens / 8; ++n) higher = fmaxf(higher, fmaxf(s[m][n][2 * i], s[m][n][2 * i + 1]));
                higher = fmaxf(higher, __shfl_xor_sync(kFullMask, higher, 1));
                higher = fmaxf(higher, __shfl_xor_sync(kFullMask, higher, 2));
                const float base = higher == negative_infinity() ? 0.f : higher * scale;
                const float shrink = exp2_approx(peak[m][i] * scale - base);
                if (__any_sync(kFullMask, higher > peak[m][i])) {
                    sum[m][i] *= shrink;
#pragma unroll
                    for (int n = 0; n < kHeadDim / 8; ++n) out[m][n][2 * i] *= shrink, out[m][n][2 * i + 1] *= shrink;
                }
                peak[m][i] = higher;
#pragma unroll
                for (int n = 0; n < kTokens / 8; ++n) {
                    s[m][n][2 * i] = exp2_approx(s[m][n][2 * i] * scale - base);
                    s[m][n][2 * i + 1] = exp2_approx(s[m][n][2 * i + 1] * scale - base);
                    sum[m][i] += s[m][n][2 * i] + s[m][n][2 * i + 1];
                }
            }
    }
    // out += p V; the fragments of the scores are those of p, in place.
    __device__ __forceinline__ void add(const float (&s)[kM][kTokens / 8][4], const u16* value, int lane) {
#pragma unroll
        for (int step = 0; step < kTokens / 16; ++step) {
            u32 a[kM][4];
#pragma unroll
            for (int m = 0; m < kM; ++m)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    a[m][j] = pack_bf16(s[m][2 * step + j / 2][j % 2 * 2], s[m][2 * step + j / 2][j % 2 * 2 + 1]);
#pragma unroll
            for (int pair = 0; pair < kHeadDim / 16; ++pair) {
                u32 v[4];
                ldmatrix_x4_trans(v, value + swizzled(step * 16 + lane / 8 % 2 * 8 + lane % 8, pair * 2 + lane / 16));
#pragma unroll
                for (int m = 0; m < kM; ++m) {
                    mma_bf16(out[m][2 * pair], a[m][0], a[m][1], a[m][2], a[m][3], v[0], v[1]);
                    mma_bf16(out[m][2 * pair + 1], a[m][0], a[m][1], a[m][2], a[m][3], v[2], v[3]);
                }
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(kThreads, kIsWide ? 1 : 2) attention_prefill(const Params p) {
    LORAPLEX_SHARED(Shared, shared);
    allow_dependents();
    dependency_wait();
    const Tile tile = p.tiles[blockIdx.y];
    const int kv_head = blockIdx.x, group = p.kv.num_heads / p.kv.num_kv_heads, window = p.kv.window;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int first_token = tile.first_row / group;
    const int last_token = min(tile.count - 1, (tile.first_row + kRows - 1) / group);
    const int end = tile.start + last_token + 1;
    const int begin = window > 0 ? max(0, tile.start + first_token - window + 1) / kTokens * kTokens : 0;
    int page = fetch_page(p.kv, tile.sequence, begin, end);
    load_q(p, tile, kv_head, group, shared.q);
    load_tile(p.kv, kv_head, page, begin, end, 0, shared);
    if (begin + kTokens < end) page = fetch_page(p.kv, tile.sequence, begin + kTokens, end);

    Rows rows{};
    const int first_row = tile.first_row + warp * kM * 16;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            rows.peak[m][i] = negative_infinity();
        }
    // The warp's rows see tokens up to warp_last, and all of them see tokens up to warp_first.
    const int warp_first = tile.start + first_row / group;
    const int warp_last =
        first_row / group < tile.count ? tile.start + min((first_row + kM * 16 - 1) / group, tile.count - 1) : -1;
    const float scale = exponent_scale(p.kv);

    for (int first = begin, stage = 0; first < end; first += kTokens, stage ^= 1) {
        copy_async_wait<0>();
        __syncthreads();  // this tile has landed, and no warp reads the other buffers
        if (first + kTokens < end) {
            load_tile(p.kv, kv_head, page, first + kTokens, end, stage ^ 1, shared);
            if (first + 2 * kTokens < end) page = fetch_page(p.kv, tile.sequence, first + 2 * kTokens, end);
        }
        finish_tile(stage, shared);
        if (first > warp_last) continue;
        float s[kM][kTokens / 8][4] = {};
        rows.score(s, shared.q, key_tile(shared, stage), warp, lane);
        if constexpr (kHasSoftcap) rows.cap(s, scale);
        if (first + kTokens - 1 > warp_first || window > 0) rows.mask(s, first, window, tile, first_row, group, lane);
        rows.weigh(s, kHasSoftcap ? 1.f : scale);
        rows.add(s, value_tile(shared, stage), lane);
    }
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float sum = rows.sum[m][i];
            sum += __shfl_xor_sync(kFullMask, sum, 1);
            sum += __shfl_xor_sync(kFullMask, sum, 2);
            const int row = first_row + m * 16 + i * 8 + lane / 4, token = row / group, head = kv_head * group + row % group;
            if (token >= tile.count) continue;
            elem* to = p.out + (static_cast<i64>(tile.token_begin + token) * p.kv.num_heads + head) * kHeadDim + lane % 4 * 2;
            const float inverse = 1.f / sum;
#pragma unroll
            for (int n = 0; n < kHeadDim / 8; ++n)
                *reinterpret_cast<u32*>(to + n * 8) =
                    pack_bf16(rows.out[m][n][2 * i] * inverse, rows.out[m][n][2 * i + 1] * inverse);
        }
}
