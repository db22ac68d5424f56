// The expand of qkv folded into qk-norm + rotary embedding + KV write (lora_expand.cuh, rope.cuh). Groups of adapter -1
// carry the rows without one.
//
// Work item: begin = first fused output, extent = outputs: whole heads of one of q, k, v, at most 512 outputs. Grid:
// any; CTAs stride over the items. Block: 256 threads; in the pointwise half a warp finishes a head of a token.
// Shared memory: 32 KiB of B + 16.1 KiB of delta + 8.3 KiB of h. Registers: 3 CTAs per SM by shared memory, hence at most 80. Architectures: sm_80 and up.
#include "lora_expand.cuh"
#include "rope.cuh"

constexpr int kRun = 512;
constexpr int kStride = kRun + 4;

struct Shared {
    u8 weights[kWeightBytes];
    float delta[kGroupTokens * kStride];
    HiddenTile tile;
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "lora_decode.py asks for it");

struct Params {
    LoraTables lora;
    ExpandParams expand;
    RopeParams rope;
};
static_assert(sizeof(Params) == 192, "lora.py mirrors it");

extern "C" __global__ void __launch_bounds__(kExpandThreads, 3) lora_rope_kv(const Params p) {
    LORAPLEX_SHARED(Shared, shared);
    allow_dependents();
    const int num_items = p.lora.range[1];
    const int lane = threadIdx.x % kWarp, heads = p.rope.num_heads + 2 * p.rope.num_kv_heads;
    const auto begin = [&](const Work& work) {
        const int slice = slice_of(p.expand, work.item.begin), n = work.item.begin - p.expand.slice_begin[slice];
        begin_item(p.lora, work.entry, slice, n, work.item.extent, shared.weights, kWeightBytes);
    };
    for (int i = blockIdx.x; i < num_items; i += gridDim.x) {
        const Work work = fetch_work(p.lora, i);
        begin(work);
        const Item& item = work.item;
        const Group& group = p.lora.groups[item.group];
        const int slice = slice_of(p.expand, item.begin), n = item.begin - p.expand.slice_begin[slice];
        dependency_wait();
        expand_item(p.lora, work.entry, p.expand, group, slice, n, item.extent, shared.weights, kWeightBytes, shared.tile,
                    shared.delta, kStride);
        const int run_heads = item.extent / kHeadDim;
        for (int unit = threadIdx.x / kWarp; unit < group.count * run_heads; unit += kExpandWarps) {
            const int which = unit / run_heads, token = group.tokens[which], local = unit % run_heads;
            const int head = item.begin / kHeadDim + local;
            const elem* from = p.rope.qkv + (static_cast<i64>(token) * heads + head) * kHeadDim + lane * kPairs;
            const float* add = shared.delta + which * kStride + local * kHeadDim + lane * kPairs;
            float low[kPairs], high[kPairs];
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                low[j] = rounded(to_float(from[j]) + add[j]);
                high[j] = rounded(to_float(from[j + kHeadDim / 2]) + add[j + kHeadDim / 2]);
            }
            finish_head(p.rope, token, head, low, high);
        }
        __syncthreads();
    }
    dependency_wait();
}
