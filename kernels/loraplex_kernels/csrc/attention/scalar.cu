// out = softmax(scale * q K^T) V, causal, for any mix of decode rows and prefill chunks, by scalar fp32 arithmetic: the
// exact kernel for fp32 models, and a second opinion on the tensor-core kernels.
//
// Grid: (ceil(heads / 4), tokens). Block: 4 warps, a warp per (token, query head): lanes are keys for the scores, dims
// for the sum. Shared memory: 4 x HEAD_DIM floats of q. Registers: 4 CTAs of 128 threads per SM, hence at most 128.
// Architectures: sm_80 and up.
#include "attention/paged_kv.cuh"

constexpr int kWarps = 4;
constexpr int kLaneDims = (kHeadDim + kWarp - 1) / kWarp;

struct Params {
    PagedKv kv;
    const elem* q;         // [tokens, q_stride]: heads first
    elem* out;             // [tokens, num_heads * HEAD_DIM]
    const int* sequences;  // [tokens] row of the block table; -1: padding, out is zeroed
    const int* positions;  // [tokens]
    i64 q_stride;
};
static_assert(sizeof(Params) == 96, "params.py mirrors it");

#ifdef KV_SCALES
__device__ __forceinline__ float score(const u8* key, const float* q) {
    float sum = 0.f;
    for (int dim = 0; dim < kHeadDim; dim += 4) {
        const u32 raw = *reinterpret_cast<const u32*>(key + dim);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum += fp8_float(static_cast<u8>(raw >> 8 * j)) * q[dim + j];
    }
    return sum;
}
__device__ __forceinline__ float value_of(const u8* v) { return fp8_float(*v); }
// The scale of K (0) or V (1) of a token, as a float.
__device__ __forceinline__ float kv_scale(const PagedKv& p, int page, int kv_head, int token, int which) {
    return low_float(*scale_address(p, page, kv_head, token) >> 16 * which);
}
#else
__device__ __forceinline__ float value_of(const elem* v) { return to_float(*v); }
__device__ __forceinline__ float kv_scale(const PagedKv&, int, int, int, int) { return 1.f; }
__device__ __forceinline__ float score(const elem* key, const float* q) {
    float sum = 0.f;
    for (int dim = 0; dim < kHeadDim; dim += kVec) {
        const Vec k = load_vec(key + dim);
#pragma unroll
        for (int j = 0; j < kVec; ++j) sum += to_float(k.v[j]) * q[dim + j];
    }
    return sum;
}
#endif

__device__ __forceinline__ bool has_dim(int j, int lane) { return kHeadDim % kWarp == 0 || j * kWarp + lane < kHeadDim; }

extern "C" __global__ void __launch_bounds__(kWarps * kWarp, 4) attention_scalar(const Params p) {
    __shared__ float queries[kWarps][kHeadDim];
    allow_dependents();
    dependency_wait();
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int token = blockIdx.y, head = blockIdx.x * kWarps + warp;
    if (head >= p.kv.num_heads) return;
    const int kv_head = head / (p.kv.num_heads / p.kv.num_kv_heads);
    const int sequence = p.sequences[token], end = sequence < 0 ? 0 : p.positions[token] + 1;
    const elem* q_row = p.q + token * p.q_stride + head * kHeadDim;
    for (int dim = lane; dim < kHeadDim; dim += kWarp) queries[warp][dim] = to_float(q_row[dim]);
    __syncwarp();
    float peak = negative_infinity(), sum = 0.f, out[kLaneDims] = {};
    for (int first = p.kv.window > 0 ? max(0, end - p.kv.window) : 0; first < end; first += kWarp) {
        const int key = first + lane;
        const int page = page_of(p.kv, sequence, min(key, end - 1));
        float s = negative_infinity();
        float value_scale = 1.f;  // of this lane's key
        if (key < end) {
            s = score(key_address(p.kv, page, kv_head, key), queries[warp]) * kv_scale(p.kv, page, kv_head, key, 0);
            s = softcap(s * p.kv.scale);
            value_scale = kv_scale(p.kv, page, kv_head, key, 1);
        }
        const float higher = fmaxf(peak, warp_max(s));
        const float weight = expf(s - higher), shrink = expf(peak - higher);
        peak = higher;
        sum = sum * shrink + warp_sum(weight);
#pragma unroll
        for (int j = 0; j < kLaneDims; ++j) out[j] *= shrink;
        const int count = min(kWarp, end - first);
        for (int i = 0; i < count; ++i) {
            const float w = __shfl_sync(kFullMask, kIsFp8 ? weight * value_scale : weight, i);
            const kv_elem* v = key_address(p.kv, __shfl_sync(kFullMask, page, i), kv_head, first + i) + kv_plane(p.kv);
#pragma unroll
            for (int j = 0; j < kLaneDims; ++j) {
                if (has_dim(j, lane)) out[j] += w * value_of(v + j * kWarp + lane);
            }
        }
    }
    elem* out_row = p.out + (static_cast<i64>(token) * p.kv.num_heads + head) * kHeadDim;
#pragma unroll
    for (int j = 0; j < kLaneDims; ++j)
        if (has_dim(j, lane)) out_row[j * kWarp + lane] = from_float<elem>(sum == 0.f ? 0.f : out[j] / sum);
}
