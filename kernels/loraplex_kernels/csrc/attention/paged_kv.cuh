// Where K and V of a token lie in the pool: [layer][K|V][kv_head][token][dim] in a page. Attention kernels read them through
// PagedKv; the kernel that finishes qkv writes them with kv_row() and write_head().
#pragma once
#include "common.cuh"
#ifdef KV_SCALES
#include "attention/kv_fp8.cuh"
#endif

constexpr int kHeadDim = HEAD_DIM;
static_assert(kHeadDim % 16 == 0 && kHeadDim <= 256, "a thread writes two runs of 8 dims, an mma step takes 16");
#ifdef KV_SCALES
constexpr bool kIsFp8 = true;
using kv_elem = u8;
#else
constexpr bool kIsFp8 = false;
using kv_elem = elem;
#endif
constexpr float kLog2E = 1.4426950408889634f;

struct PagedKv {
    const u8* pool;
    const int* block_tables;  // [sequences][table_stride] page ids
    i64 page_bytes;
    i64 layer_offset;  // bytes from a page's start to this layer's K
    int table_stride;
    int block_shift;  // log2 of the tokens of a page
    int num_heads;
    int num_kv_heads;
    int window;   // a query sees this many last tokens, itself included; 0: all
    float scale;  // of the scores, usually 1 / sqrt(HEAD_DIM)
};
static_assert(sizeof(PagedKv) == 56, "params.py mirrors it");

// A score as the exponent to base 2 that softmax takes: product * exponent_scale(), or SOFTCAP * tanh(score / SOFTCAP).
#ifdef SOFTCAP
constexpr bool kHasSoftcap = true;
__device__ __forceinline__ float softcap(float score) { return SOFTCAP * tanhf(score * (1.f / SOFTCAP)); }
__device__ __forceinline__ float exponent_scale(const PagedKv& p) { return p.scale * (2.f * kLog2E / SOFTCAP); }
// tanh(x) = 1 - 2 / (1 + e^2x): its error is 2^-22 of the cap, where tanh.approx has 2^-11.
__device__ __forceinline__ float exponent(float product, float scale) {
    return SOFTCAP * kLog2E * (1.f - 2.f * reciprocal_approx(1.f + exp2_approx(product * scale)));
}
#else
constexpr bool kHasSoftcap = false;
__device__ __forceinline__ float softcap(float score) { return score; }
__device__ __forceinline__ float exponent_scale(const PagedKv& p) { return p.scale * kLog2E; }
__device__ __forceinline__ float exponent(float product, float scale) { return product * scale; }
#endif

// K row of one token; V's is kv_plane() elements further.
__device__ __forceinline__ const kv_elem* key_address(const PagedKv& p, int page, int kv_head, int token) {
    const int in_block = token & ((1 << p.block_shift) - 1);
    const i64 row = (static_cast<i64>(kv_head) << p.block_shift) + in_block;
    return reinterpret_cast<const kv_elem*>(p.pool + page * p.page_bytes + p.layer_offset) + row * kHeadDim;
}
#ifdef KV_SCALES
// Bytes from a page's start to a layer's scales, four for every token and KV head: a layer's K and V take 2 HEAD_DIM of each.
__device__ __forceinline__ i64 scales_offset(i64 layer_offset) { return KV_SCALES + layer_offset / (kHeadDim / 2); }
// The scales of K (low half) and V (high half) of one token.
__device__ __forceinline__ const u32* scale_address(const PagedKv& p, int page, int kv_head, int token) {
    const int in_block = token & ((1 << p.block_shift) - 1);
    const u8* first = p.pool + page * p.page_bytes + scales_offset(p.layer_offset);
    return reinterpret_cast<const u32*>(first) + ((static_cast<i64>(kv_head) << p.block_shift) + in_block);
}
#endif
__device__ __forceinline__ i64 kv_plane(const PagedKv& p) {
    return (static_cast<i64>(p.num_kv_heads) << p.block_shift) * kHeadDim;
}
__device__ __forceinline__ int page_of(const PagedKv& p, int sequence, int token) {
    return p.block_tables[static_cast<i64>(sequence) * p.table_stride + (token >> p.block_shift)];
}

// The K and V of one layer that new tokens are written to.
struct KvTarget {
    u8* pool;
    i64 page_bytes;
    i64 layer_offset;  // bytes from a page's start to this layer's K
    int block_tokens;
};

constexpr int kRun = 8;  // neighbouring dims of a head that a thread writes at a time
struct Run {
    float v[kRun];
};
__device__ __forceinline__ void store_run(elem* to, const Run& run) {
#pragma unroll
    for (int i = 0; i < kRun / kVec; ++i) {
        Vec vec;
#pragma unroll
        for (int j = 0; j < kVec; ++j) vec.v[j] = from_float<elem>(run.v[i * kVec + j]);
        store_vec(to + i * kVec, vec);
    }
}

#ifdef KV_SCALES
__device__ __forceinline__ void store_fp8(u8* to, const Run& run, float inverse) {
    u32 words[2] = {};
#pragma unroll
    for (int j = 0; j < kRun; ++j) words[j / 4] |= fp8_bits(rounded(run.v[j]) * inverse) << j % 4 * 8;
    *reinterpret_cast<Pair*>(to) = Pair{words[0], words[1]};
}
#endif

// Head `head` (0..kv_heads: K; then kv_heads of V) of the token in KV slot `slot` (page * block_tokens + token in page).
__device__ __forceinline__ kv_elem* kv_row(const KvTarget& to, int slot, int head) {
    const i64 page = slot / to.block_tokens, token = slot % to.block_tokens;
    const i64 row = static_cast<i64>(head) * to.block_tokens + token;
    return reinterpret_cast<kv_elem*>(to.pool + page * to.page_bytes + to.layer_offset) + row * kHeadDim;
}

// Writes two runs of a head, `distance` dims apart; its other dims are those of other lanes.
__device__ __forceinline__ void write_head(elem* to, int distance, const Run& first, const Run& second) {
    store_run(to, first);
    store_run(to + distance, second);
}

#ifdef KV_SCALES
// Writes two runs of a head of K or V as e4m3, `distance` dims apart, and its scale. The lanes that hold the head's other dims
// call it, too: `lanes` are theirs, `leads` is true in one of them.
__device__ __forceinline__ void write_fp8(const KvTarget& to, int slot, int head, int num_kv_heads, int dim, int distance,
                                          u32 lanes, bool leads, const Run& first, const Run& second) {
    u32 most = 0;
#pragma unroll
    for (int j = 0; j < kRun; ++j)
        most = max(most, max(magnitude_bits(rounded(first.v[j])), magnitude_bits(rounded(second.v[j]))));
    const u32 scale = scale_of(__reduce_max_sync(lanes, most));
    const float inverse = 1.f / low_float(scale);
    u8* row = kv_row(to, slot, head) + dim;
    store_fp8(row, first, inverse);
    store_fp8(row + distance, second, inverse);
    const i64 page = slot / to.block_tokens, token = slot % to.block_tokens;
    u8* scales = to.pool + page * to.page_bytes + scales_offset(to.layer_offset);
    const i64 at = (static_cast<i64>(head % num_kv_heads) * to.block_tokens + token) * 2 + head / num_kv_heads;
    if (leads) reinterpret_cast<u16*>(scales)[at] = static_cast<u16>(scale);
}
#endif
