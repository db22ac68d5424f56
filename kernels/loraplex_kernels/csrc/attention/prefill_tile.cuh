// A tile of K and V in shared memory, for prefill.cu: how it is copied there, and of FP8, how it is made bf16.
//
// Tiles are double-buffered. Of bf16 a tile is copied to where it is read. Of FP8 the bytes and their scales are, and are
// turned to one bf16 tile by all threads of the CTA once, behind a barrier: each warp on its own would do so four times.
#pragma once
#include "attention/paged_kv.cuh"

constexpr bool kIsWide = kHeadDim > 128;
constexpr int kWarps = kIsWide ? 8 : 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kM = kIsWide ? 1 : 2;  // blocks of 16 rows of a warp
constexpr int kRows = 16 * kM * kWarps;
constexpr int kChunks = kHeadDim / 8;  // 16-byte chunks of a row of q, K or V
constexpr bool kIsSwizzled = kChunks % 8 == 0;
constexpr int kStride = kIsSwizzled ? kChunks : kChunks + 1;  // of rows in shared memory, in chunks
constexpr int kTileBytes = kIsFp8 ? 2 * 16 * kStride + 4 * kHeadDim + 8 : 4 * 16 * kStride;  // per token of a tile
constexpr int kTokens = (SHARED_BYTES - kRows * 16 * kStride) / kTileBytes;                  // of a tile of K and V
constexpr int kLaneTokens = kTokens > kWarp ? kTokens / kWarp : 1;                           // whose pages a lane looks up
static_assert(kRows == 128 && kTokens % 16 == 0, "attention/prefill.py chooses the tile");

#ifdef KV_SCALES
struct Shared {
    u16 q[kRows * kStride * 8];
    u16 key[kTokens * kStride * 8];
    u16 value[kTokens * kStride * 8];
    alignas(16) u8 raw[2][2 * kTokens * kHeadDim];  // K, then V
    u32 scales[2][kTokens];                         // of K in the low half, of V in the high one
};
#else
struct Shared {
    u16 q[kRows * kStride * 8];
    u16 key[2][kTokens * kStride * 8];
    u16 value[2][kTokens * kStride * 8];
};
#endif
static_assert(sizeof(Shared) == SHARED_BYTES, "attention/prefill.py asks for it");

// Eight rows' chunks c lie on all 32 banks: rows are an odd number of chunks apart, or c is permuted by the row.
__device__ __forceinline__ int swizzled(int row, int chunk) {
    return (row * kStride + (kIsSwizzled ? chunk ^ (row & 7) : chunk)) * 8;
}

// Where threads divide by chunks, all copies of a thread have the same chunk and are kRowStep rows apart.
constexpr bool kHasOwnChunk = kThreads % kChunks == 0;
constexpr int kRowStep = kThreads / kChunks;
static_assert(kTokens * kChunks % kThreads == 0 && kRows * kChunks % kThreads == 0, "all threads copy alike");

// The page of this lane's tokens of a tile; a tile's page ids are spread over a warp. Pages hold 2 tokens or more.
__device__ __forceinline__ int fetch_page(const PagedKv& kv, int sequence, int first, int end) {
    return page_of(kv, sequence, min(first + static_cast<int>(threadIdx.x % kWarp) * kLaneTokens, end - 1));
}

#ifdef KV_SCALES
__device__ __forceinline__ const u16* key_tile(const Shared& shared, int) { return shared.key; }
__device__ __forceinline__ const u16* value_tile(const Shared& shared, int) { return shared.value; }

constexpr int kRawChunks = kHeadDim / 16;  // of 16 bytes, in a row of K or V
static_assert(2 * kTokens * kRawChunks % kThreads == 0, "all threads copy alike");

// Starts the copy of tokens [first, first + kTokens) of K and V and their scales; tokens past the end are zeroed.
__device__ __forceinline__ void load_tile(const PagedKv& kv, int kv_head, int page, int first, int end, int stage,
                                          Shared& shared) {
    const i64 plane = kv_plane(kv);
#pragma unroll 1  // the scores leave few registers
    for (int i = 0; i < 2 * kTokens * kRawChunks / kThreads; ++i) {
        const int at = threadIdx.x + i * kThreads, row = at / kRawChunks, token = row % kTokens, chunk = at % kRawChunks;
        const u8* from =
            key_address(kv, __shfl_sync(kFullMask, page, token / kLaneTokens), kv_head, first + token) + chunk * 16;
        copy_async16(shared.raw[stage] + at * 16, from + (row < kTokens ? 0 : plane), first + token < end);
    }
    const int token = threadIdx.x % kTokens, scales_page = __shfl_sync(kFullMask, page, token / kLaneTokens);
    if (static_cast<int>(threadIdx.x) < kTokens)
        copy_async4(shared.scales[stage] + token, scale_address(kv, scales_page, kv_head, first + token), first + token < end);
    copy_async_commit();
}

// Turns the tile that has landed to bf16; no warp reads the one before any more.
__device__ __forceinline__ void finish_tile(int stage, Shared& shared) {
#pragma unroll 1
    for (int i = 0; i < 2 * kTokens * kRawChunks / kThreads; ++i) {
        const int at = threadIdx.x + i * kThreads, row = at / kRawChunks, token = row % kTokens, chunk = at % kRawChunks * 2;
        const bool is_key = row < kTokens;
        const u32 scales = shared.scales[stage][token], multiplier = multiplier_of(is_key ? scales & 0xffffu : scales >> 16);
        const Quad raw = *reinterpret_cast<const Quad*>(shared.raw[stage] + at * 16);
        Quad first, second;
        widen4(in_pairs(raw.x), multiplier, first.x, first.y);
        widen4(in_pairs(raw.y), multiplier, first.z, first.w);
        widen4(in_pairs(raw.z), multiplier, second.x, second.y);
        widen4(in_pairs(raw.w), multiplier, second.z, second.w);
        u16* to = is_key ? shared.key : shared.value;
        *reinterpret_cast<Quad*>(to + swizzled(token, chunk)) = first;
        *reinterpret_cast<Quad*>(to + swizzled(token, chunk + 1)) = second;
    }
    __syncthreads();
}
#else
__device__ __forceinline__ const u16* key_tile(const Shared& shared, int stage) { return shared.key[stage]; }
__device__ __forceinline__ const u16* value_tile(const Shared& shared, int stage) { return shared.value[stage]; }
__device__ __forceinline__ void finish_tile(int, Shared&) {}

// Starts the copy of tokens [first, first + kTokens) of K and V; tokens past the end are zeroed.
__device__ __forceinline__ void load_tile(const PagedKv& kv, int kv_head, int page, int first, int end, int stage,
                                          Shared& shared) {
    u16 *key = shared.key[stage], *value = shared.value[stage];
    const int own_chunk = threadIdx.x % kChunks;
    const i64 plane = kv_plane(kv);
#pragma unroll(kHasOwnChunk ? 2 : 1)  // no more, as the scores leave few registers
    for (int i = 0; i < kTokens * kChunks / kThreads; ++i) {
        const int at = threadIdx.x + i * kThreads;
        const int row = kHasOwnChunk ? threadIdx.x / kChunks + i * kRowStep : at / kChunks;
        const int chunk = kHasOwnChunk ? own_chunk : at % kChunks;
        const bool live = first + row < end;
        const elem* from = key_address(kv, __shfl_sync(kFullMask, page, row / kLaneTokens), kv_head, first + row) + chunk * 8;
        copy_async16(key + swizzled(row, chunk), from, live);
        copy_async16(value + swizzled(row, chunk), from + plane, live);
    }
    copy_async_commit();
}
#endif
