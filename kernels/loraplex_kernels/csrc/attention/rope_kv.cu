// Qk-norm, rotary embedding (rotate-half) and KV write of the fused [q | k | v] rows, LoRA's delta added first if there is one;
// q is rotated in place, K and V go to the pool.
//
// Grid: (ceil(heads + 2 * kv_heads, heads of a block), tokens). Block: 256 threads. A thread takes 8 neighbouring dims of a
// head's lower half and their partners in the upper: 16-byte accesses only; HEAD_DIM / 16 threads share a head. No
// shared memory. Alignment: rows on 16 bytes.
// Registers: 4 CTAs per SM, hence at most 64. Architectures: sm_80 and up. Source: Su et al., arXiv:2104.09864.
#include "attention/paged_kv.cuh"

constexpr int kHalf = kHeadDim / 2;
constexpr int kHeadThreads = kHalf / kRun;
constexpr int kBlockHeads = 256 / kHeadThreads;
static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256, "a head's threads are a part of a warp");

struct Params {
    elem* qkv;             // [tokens, (heads + 2 * kv_heads) * HEAD_DIM]
    const float* rotary;   // [positions][HEAD_DIM]: cosines, then sines, HEAD_DIM / 2 each
    const int* positions;  // [tokens]
    const int* kv_slots;   // [tokens]: page * block_tokens + token in page; -1: K and V are not kept
    u8* pool;
    const elem* q_norm;  // [HEAD_DIM] or null
    const elem* k_norm;
    const float* delta;  // LoRA's, as qkv; or null
    i64 page_bytes;
    i64 layer_offset;  // bytes from a page's start to this layer's K
    int num_heads;
    int num_kv_heads;
    int block_tokens;
    float norm_eps;
};
static_assert(sizeof(Params) == 96, "params.py mirrors it");

__device__ __forceinline__ Run load_run(const elem* from) {
    Run run;
#pragma unroll
    for (int i = 0; i < kRun / kVec; ++i) {
        const Vec vec = load_vec(from + i * kVec);
#pragma unroll
        for (int j = 0; j < kVec; ++j) run.v[i * kVec + j] = to_float(vec.v[j]);
    }
    return run;
}
__device__ __forceinline__ Run load_floats(const float* from) {
    alignas(16) Run run;
    reinterpret_cast<Quad*>(run.v)[0] = reinterpret_cast<const Quad*>(from)[0];
    reinterpret_cast<Quad*>(run.v)[1] = reinterpret_cast<const Quad*>(from)[1];
    return run;
}

__device__ __forceinline__ void add_delta(const float* delta, Run& run) {
    const Run more = load_floats(delta);
#pragma unroll
    for (int j = 0; j < kRun; ++j) run.v[j] = rounded(run.v[j] + more.v[j]);
}

// Multiplies a head by its norm's weight over its root mean square.
__device__ __forceinline__ void norm_head(const elem* weight, float eps, Run& low, Run& high) {
    float squares = 0.f;
#pragma unroll
    for (int j = 0; j < kRun; ++j) squares += low.v[j] * low.v[j] + high.v[j] * high.v[j];
#pragma unroll
    for (int mask = 1; mask < kHeadThreads; mask <<= 1) squares += __shfl_xor_sync(kFullMask, squares, mask);
    const float scale = rsqrtf(squares / kHeadDim + eps);
    const Run low_weight = load_run(weight), high_weight = load_run(weight + kHalf);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
        low.v[j] = rounded(low_weight.v[j] * rounded(low.v[j] * scale));
        high.v[j] = rounded(high_weight.v[j] * rounded(high.v[j] * scale));
    }
}

__device__ __forceinline__ void rotate_head(const float* rotary, Run& low, Run& high) {
    const Run cosine = load_floats(rotary), sine = load_floats(rotary + kHalf);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
        const float a = low.v[j], b = high.v[j];
        low.v[j] = a * cosine.v[j] - b * sine.v[j];
        high.v[j] = b * cosine.v[j] + a * sine.v[j];
    }
}

extern "C" __global__ void __launch_bounds__(256, 4) rope_kv(const Params p) {
    allow_dependents();
    dependency_wait();
    const int heads = p.num_heads + 2 * p.num_kv_heads, token = blockIdx.y;
    const int index = blockIdx.x * kBlockHeads + threadIdx.x / kHeadThreads, dim = threadIdx.x % kHeadThreads * kRun;
    const bool is_live = index < heads;  // all threads of a warp go on, as the norm needs them
    const int head = is_live ? index : 0;
    const bool is_q = head < p.num_heads, is_v = head >= p.num_heads + p.num_kv_heads;
    const i64 at = (static_cast<i64>(token) * heads + head) * kHeadDim + dim;
    Run low = load_run(p.qkv + at), high = load_run(p.qkv + at + kHalf);
    if (p.delta != nullptr) {
        add_delta(p.delta + at, low);
        add_delta(p.delta + at + kHalf, high);
    }
    if (p.q_norm != nullptr) {
        Run normed_low = low, normed_high = high;
        norm_head((is_q ? p.q_norm : p.k_norm) + dim, p.norm_eps, normed_low, normed_high);
        if (!is_v) low = normed_low, high = normed_high;
    }
    if (!is_v) rotate_head(p.rotary + static_cast<i64>(p.positions[token]) * kHeadDim + dim, low, high);
    if (!is_live) return;
    elem* to = p.qkv + at;
    if (!is_q) {
        const int slot = p.kv_slots[token];
        if (slot < 0) return;
        to = kv_row({p.pool, p.page_bytes, p.layer_offset, p.block_tokens}, slot, head - p.num_heads) + dim;
    }
    write_head(to, kHalf, low, high);
}
