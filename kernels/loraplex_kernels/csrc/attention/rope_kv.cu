// Norms of q and k, rotary embedding and KV write of the fused [q | k | v] rows, LoRA's delta added first if there is one;
// q is rotated in place, K and V go to the pool.
//
// Macros: ROTARY_DIM of a head's first dims are rotated (all if unset; 0: none); INTERLEAVED: dims 2i and 2i + 1 are a pair, not
// i and i + ROTARY_DIM / 2; NORM_OFFSET: norms multiply by 1 + weight; WHOLE_NORM: q is normalised over all its heads at
// once, k likewise; QUERY_SCALE: rotated queries are multiplied by a factor of their position.
//
// Grid: (ceil(heads + 2 * kv_heads, heads of a block), tokens), with WHOLE_NORM (3, tokens): q, k, v. Block: 256 threads. A thread
// takes two runs of 8 neighbouring dims of a head that hold both dims of each pair: 16-byte accesses only; HEAD_DIM / 16
// threads share a head, rounded up to a power of two, of which the last idle. Shared memory: a float a warp with WHOLE_NORM, else
// none. Alignment: rows on 16 bytes.
// Registers: 4 CTAs per SM, hence at most 64. Architectures: sm_80 and up. Source: Su et al., arXiv:2104.09864.
#include "attention/rope.cuh"

struct Params {
    elem* qkv;             // [tokens, (heads + 2 * kv_heads) * HEAD_DIM]
    const float* rotary;   // [positions][ROTARY_DIM]: cosines, then sines, ROTARY_DIM / 2 each
    const int* positions;  // [tokens]
    const int* kv_slots;   // [tokens]: page * block_tokens + token in page; -1: K and V are not kept
    u8* pool;
    const elem* q_norm;  // [HEAD_DIM], with WHOLE_NORM [heads * HEAD_DIM]; or null
    const elem* k_norm;
    const float* delta;  // LoRA's, as qkv; or null
    i64 page_bytes;
    i64 layer_offset;  // bytes from a page's start to this layer's K
    int num_heads;
    int num_kv_heads;
    int block_tokens;
    float norm_eps;
    const float* query_scale;  // [positions]; with QUERY_SCALE only
};
static_assert(sizeof(Params) == 104, "params.py mirrors it");

__device__ __forceinline__ void rotate(const Params& p, int token, bool is_q, int dim, Run& low, Run& high) {
    if constexpr (kRotary != 0) {
        if (is_rotated(dim)) rotate_head(p.rotary + static_cast<i64>(p.positions[token]) * kRotary + dim, low, high);
    }
#ifdef QUERY_SCALE
    if (is_q) {
        const float scale = rounded(p.query_scale[p.positions[token]]);
        scale_run(scale, low);
        scale_run(scale, high);
    }
#endif
}

// Stores q where it was, K and V in their page.
__device__ __forceinline__ void store_head(const Params& p, int token, int head, i64 at, int dim, const Run& low,
                                           const Run& high) {
    elem* to = p.qkv + at;
    if (head >= p.num_heads) {
        const int slot = p.kv_slots[token];
        if (slot < 0) return;
        const KvTarget target{p.pool, p.page_bytes, p.layer_offset, p.block_tokens};
#ifdef KV_SCALES
        const u32 lanes = ((1u << kHalf / kRun) - 1) << threadIdx.x % kWarp / kHeadLanes * kHeadLanes;
        write_fp8(target, slot, head - p.num_heads, p.num_kv_heads, first_dim(dim), run_distance(dim), lanes, dim == 0, low,
                  high);
        return;
#else
        to = kv_row(target, slot, head - p.num_heads) + first_dim(dim);
#endif
    }
    write_head(to, run_distance(dim), low, high);
}

__device__ __forceinline__ void load_head(const Params& p, i64 at, int dim, Run& low, Run& high) {
    low = load_run(p.qkv + at), high = load_run(p.qkv + at + run_distance(dim));
    if (p.delta != nullptr) {
        add_delta(p.delta + at, low);
        add_delta(p.delta + at + run_distance(dim), high);
    }
}

#ifdef WHOLE_NORM
__device__ __forceinline__ void finish_qkv(const Params& p) {
    __shared__ float scratch[256 / kWarp];
    const int token = blockIdx.y, part = blockIdx.x, row_heads = p.num_heads + 2 * p.num_kv_heads;
    const int count = part == 0 ? p.num_heads : p.num_kv_heads;
    const int begin = part == 0 ? 0 : p.num_heads + (part - 1) * p.num_kv_heads;
    const int dim = threadIdx.x % kHeadLanes * kRun, own = threadIdx.x / kHeadLanes;
    const bool is_live = dim < kHalf, is_v = part == 2;
    const i64 row = (static_cast<i64>(token) * row_heads + begin) * kHeadDim + first_dim(dim);
    const elem* weight = (part == 0 ? p.q_norm : p.k_norm) + first_dim(dim);
    Run low, high;
    float squares = 0.f;
    for (int head = own; head < count && is_live && !is_v; head += kBlockHeads) {
        load_head(p, row + head * kHeadDim, dim, low, high);
        squares += squares_of(low, high);
    }
    const float scale = rsqrtf(block_sum<256>(squares, scratch) / (count * kHeadDim) + p.norm_eps);
    for (int head = own; head < count && is_live; head += kBlockHeads) {
        const i64 at = row + head * kHeadDim;
        load_head(p, at, dim, low, high);
        if (!is_v) {
            norm_run(weight + head * kHeadDim, scale, low);
            norm_run(weight + head * kHeadDim + run_distance(dim), scale, high);
            rotate(p, token, part == 0, dim, low, high);
        }
        store_head(p, token, begin + head, at, dim, low, high);
    }
}
#else
__device__ __forceinline__ void finish_qkv(const Params& p) {
    const int heads = p.num_heads + 2 * p.num_kv_heads, token = blockIdx.y;
    const int index = blockIdx.x * kBlockHeads + threadIdx.x / kHeadLanes;
    const int own = threadIdx.x % kHeadLanes * kRun, dim = own < kHalf ? own : 0;
    const bool is_live = index < heads && own < kHalf;  // all threads of a warp go on, as the norm needs them
    const int head = is_live ? index : 0;
    const bool is_q = head < p.num_heads, is_v = head >= p.num_heads + p.num_kv_heads;
    const i64 at = (static_cast<i64>(token) * heads + head) * kHeadDim + first_dim(dim);
    Run low, high;
    load_head(p, at, dim, low, high);
    if (p.q_norm != nullptr) {
        Run normed_low = low, normed_high = high;
        const bool counts = kHeadLanes == kHeadDim / 16 || own < kHalf;
        norm_head((is_q ? p.q_norm : p.k_norm) + first_dim(dim), run_distance(dim), counts, p.norm_eps, normed_low,
                  normed_high);
        if (!is_v) low = normed_low, high = normed_high;
    }
    if (!is_v) rotate(p, token, is_q, dim, low, high);
    if (is_live) store_head(p, token, head, at, dim, low, high);
}
#endif

extern "C" __global__ void __launch_bounds__(256, 4) rope_kv(const Params p) {
    allow_dependents();
    dependency_wait();
    finish_qkv(p);
}
