// out = silu(gate + delta_gate) * (up + delta_up): the expand of gate_up folded into the pointwise kernel that follows
// its GEMM (lora_expand.cuh, silu.cuh). Groups of adapter -1 carry the rows without one: no weights, no delta.
//
// Work item: begin = first output, extent = outputs (<= 256) of both slices. Grid: any; CTAs stride over the items.
// Block: 256 threads. Shared memory: 2 x 16 KiB of B + 2 x 8.1 KiB of delta + 8.3 KiB of h. Alignment: rows on 16
// bytes; width % 8 == 0.
// Registers: 3 CTAs per SM by shared memory, hence at most 80. Architectures: sm_80 and up.
#include "lora_expand.cuh"
#include "silu.cuh"

constexpr int kRun = 256;
constexpr int kStride = kRun + 4;
constexpr int kSliceBytes = kWeightBytes / 2;

struct Shared {
    u8 weights[2][kSliceBytes];
    float delta[2][kGroupTokens * kStride];
    HiddenTile tile;
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "lora_decode.py asks for it");

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
    LORAPLEX_SHARED(Shared, shared);
    allow_dependents();
    const int num_items = p.lora.range[1];
    const auto begin = [&](const Work& work) {
        for (int slice = 0; slice < 2; ++slice)
            begin_item(p.lora, work.entry, slice, work.item.begin, work.item.extent, shared.weights[slice], kSliceBytes);
    };
    for (int i = blockIdx.x; i < num_items; i += gridDim.x) {
        const Work work = fetch_work(p.lora, i);
        begin(work);
        const Item& item = work.item;
        const Group& group = p.lora.groups[item.group];
        dependency_wait();
        for (int slice = 0; slice < 2; ++slice)
            expand_item(p.lora, work.entry, p.expand, group, slice, item.begin, item.extent, shared.weights[slice],
                        kSliceBytes, shared.tile, shared.delta[slice], kStride);
        const int vectors = item.extent / kVec;
        const int n = threadIdx.x % (kRun / kVec) * kVec;
        for (int token = threadIdx.x / (kRun / kVec); token < group.count; token += kExpandThreads / (kRun / kVec)) {
            if (n >= vectors * kVec) break;
            const elem* from = p.gate_up + static_cast<i64>(group.tokens[token]) * 2 * p.width + item.begin + n;
            const Vec gate = load_vec(from), up = load_vec(from + p.width);
            Vec out;
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                const float g = rounded(to_float(gate.v[j]) + shared.delta[0][token * kStride + n + j]);
                const float u = rounded(to_float(up.v[j]) + shared.delta[1][token * kStride + n + j]);
                out.v[j] = from_float<elem>(silu_mul_value(g, u));
            }
            store_vec(p.out + static_cast<i64>(group.tokens[token]) * p.width + item.begin + n, out);
        }
        __syncthreads();
    }
    dependency_wait();
}
