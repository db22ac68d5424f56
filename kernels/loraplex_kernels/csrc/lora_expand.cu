// y[t, n] += delta[t][n] (lora_expand.cuh) for the tokens that have an adapter: o and down, whose GEMM or residual
// stream is y, and every op measured alone.
//
// Grid: any; CTAs stride over the items, runs of at most 512 outputs. Block: 256 threads. Shared memory: 16 KiB of delta
// + 8.3 KiB of h. Alignment: y rows and runs on 16 bytes, except the last outputs of a row.
// Registers: 3 CTAs per SM (delta's 24.6 KiB would allow 9), hence at most 80. Architectures: sm_80 and up.
#include "lora_expand.cuh"

constexpr int kRun = 512;
constexpr int kStride = kRun + 4;

struct Params {
    LoraTables lora;
    ExpandParams expand;
    elem* y;  // [tokens, y_stride]
    i64 y_stride;
};
static_assert(sizeof(Params) == 120, "lora.py mirrors it");

extern "C" __global__ void __launch_bounds__(kExpandThreads, 3) lora_expand(const Params p) {
    __shared__ HiddenTile tile;
    __shared__ __align__(16) float delta[kGroupTokens * kStride];
    allow_dependents();
    const int first_item = p.lora.range[0], num_items = p.lora.range[1];
    for (int i = blockIdx.x; i < num_items; i += gridDim.x) {
        const Item item = p.lora.items[first_item + i];
        const OpEntry& e = p.lora.entries[item.adapter * p.lora.entry_stride];
        const Group& group = p.lora.groups[item.group];
        const int slice = slice_of(p.expand, item.begin);
        if (e.rank[slice] == 0) continue;
        prefetch_run(p.lora, e, slice, item.begin - p.expand.slice_begin[slice], item.extent);
        dependency_wait();
        expand_item(p.lora, &e, p.expand, group, slice, item.begin - p.expand.slice_begin[slice], item.extent, tile,
                    delta, kStride);
        const int vectors = item.extent / kVec;
        for (int v = threadIdx.x; v < group.count * vectors; v += kExpandThreads) {
            const int token = v / vectors, n = v % vectors * kVec;
            elem* at = p.y + group.tokens[token] * p.y_stride + item.begin + n;
            Vec y = load_vec(at);
#pragma unroll
            for (int j = 0; j < kVec; ++j) y.v[j] = from_float<elem>(to_float(y.v[j]) + delta[token * kStride + n + j]);
            store_vec(at, y);
        }
        __syncthreads();
    }
    dependency_wait();
}
