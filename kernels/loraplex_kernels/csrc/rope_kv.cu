// Qk-norm, rotary embedding and KV write of the fused [q | k | v] rows, LoRA's delta added first if there is one; q is
// rotated in place, K and V go to the pool.
//
// Grid: (ceil(heads + 2 * kv_heads, 8), tokens). Block: 256 threads, one warp per head. No shared memory.
// Registers: 8 CTAs per SM, hence at most 32. Architectures: sm_80 and up. Source: Su et al., arXiv:2104.09864.
#include "rope.cuh"

extern "C" __global__ void __launch_bounds__(256, 8) rope_kv(const RopeParams p) {
    allow_dependents();
    dependency_wait();
    const int heads = p.num_heads + 2 * p.num_kv_heads;
    const int head = blockIdx.x * 8 + threadIdx.x / kWarp;
    if (head >= heads) return;
    const int token = blockIdx.y, lane = threadIdx.x % kWarp;
    const i64 at = (static_cast<i64>(token) * heads + head) * kHeadDim + lane * kPairs;
    const elem* from = p.qkv + at;
    float low[kPairs], high[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
        low[j] = to_float(from[j]);
        high[j] = to_float(from[j + kHeadDim / 2]);
    }
    if (p.delta != nullptr) {
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
            low[j] = rounded(low[j] + p.delta[at + j]);
            high[j] = rounded(high[j] + p.delta[at + j + kHeadDim / 2]);
        }
    }
    finish_head(p, token, head, low, high);
}
