// out = silu(gate + delta_gate) * (up + delta_up): the expand of gate_up folded into the pointwise kernel that follows
// its GEMM (lora_expand.cuh, silu.cuh). Groups of adapter -1 carry the rows without one: no weights, no delta.
//
// Work item: begin = first output, extent = outputs (<= 256) of both slices. Grid: any; CTAs stride over the items.
// Block: 256 threads. Shared memory: 2 x 8 KiB of delta + 8.3 KiB of h. Alignment: rows and runs on 16 bytes.
// Registers: 3 CTAs per SM, hence at most 80. Architectures: sm_80 and up.
#include "lora_expand.cuh"
#include "silu.cuh"

constexpr int kRun = 256;
constexpr int kStride = kRun + 4;

struct Params {
    LoraTables lora;
    ExpandParams expand;
    const elem* gate_up;  // [tokens, 2 * width]
    elem* out;            // [tokens, width]
    int width;
    int reserved;
};
static_assert(sizeof(Params) == 128, "lora.py mirrors it");

extern "C" __global__ void __launch_bounds__(kExpandThreads, 3) lora_silu_mul(const Params p) {
    __shared__ HiddenTile tile;
    __shared__ __align__(16) float delta[2][kGroupTokens * kStride];
    allow_dependents();
    const int first_item = p.lora.range[0], num_items = p.lora.range[1];
    for (int i = blockIdx.x; i < num_items; i += gridDim.x) {
        const Item item = p.lora.items[first_item + i];
        const OpEntry* e = item.adapter < 0 ? nullptr : &p.lora.entries[item.adapter * p.lora.entry_stride];
        const Group& group = p.lora.groups[item.group];
        if (e) {
            prefetch_run(p.lora, *e, 0, item.begin, item.extent);
            prefetch_run(p.lora, *e, 1, item.begin, item.extent);
        }
        dependency_wait();
        expand_item(p.lora, e, p.expand, group, 0, item.begin, item.extent, tile, delta[0], kStride);
        expand_item(p.lora, e, p.expand, group, 1, item.begin, item.extent, tile, delta[1], kStride);
        const int vectors = item.extent / kVec;
        for (int v = threadIdx.x; v < group.count * vectors; v += kExpandThreads) {
            const int token = v / vectors, n = v % vectors * kVec;
            const elem* from = p.gate_up + static_cast<i64>(group.tokens[token]) * 2 * p.width + item.begin + n;
            const Vec gate = load_vec(from), up = load_vec(from + p.width);
            Vec out;
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                const float g = rounded(to_float(gate.v[j]) + delta[0][token * kStride + n + j]);
                const float u = rounded(to_float(up.v[j]) + delta[1][token * kStride + n + j]);
                out.v[j] = from_float<elem>(silu_mul_value(g, u));
            }
            store_vec(p.out + static_cast<i64>(group.tokens[token]) * p.width + item.begin + n, out);
        }
        __syncthreads();
    }
    dependency_wait();
}
