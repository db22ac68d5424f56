// y[t, n] += delta[t][n] (lora_expand.cuh) for the tokens that have an adapter: o and down, whose GEMM or residual
// stream is y, and every op measured alone.
//
// Grid: any; CTAs stride over the items, runs of at most 512 outputs. Block: 256 threads. Shared memory: 32 KiB of B +
// 16.1 KiB of delta + 8.3 KiB of h. Alignment: y rows on 16 bytes; outputs % 8 == 0.
// Registers: 3 CTAs per SM by shared memory, hence at most 80. Architectures: sm_80 and up.
#include "lora_expand.cuh"

constexpr int kRun = 512;
constexpr int kStride = kRun + 4;
constexpr int kVectors = kGroupTokens * kRun / kVec / kExpandThreads;  // of y per thread

struct Shared {
    u8 weights[kWeightBytes];
    float delta[kGroupTokens * kStride];
    HiddenTile tile;
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "lora_decode.py asks for it");

struct Params {
    LoraTables lora;
    ExpandParams expand;
    elem* y;  // [tokens, y_stride]
    i64 y_stride;
};
static_assert(sizeof(Params) == 120, "lora.py mirrors it");

extern "C" __global__ void __launch_bounds__(kExpandThreads, 3) lora_expand(const Params p) {
    LORAPLEX_SHARED(Shared, shared);
    allow_dependents();
    const int num_items = p.lora.range[1];
    const auto begin = [&](const Work& work) {
        const int slice = slice_of(p.expand, work.item.begin), n = work.item.begin - p.expand.slice_begin[slice];
        begin_item(p.lora, work.entry, slice, n, work.item.extent, shared.weights, kWeightBytes);
    };
    Work work = {};
    if (blockIdx.x < num_items) begin(work = fetch_work(p.lora, blockIdx.x));
    for (int i = blockIdx.x; i < num_items; i += gridDim.x) {
        const Work next = fetch_work(p.lora, i + gridDim.x);
        const Item& item = work.item;
        const Group& group = p.lora.groups[item.group];
        const int slice = slice_of(p.expand, item.begin), n = item.begin - p.expand.slice_begin[slice];
        const int vectors = item.extent / kVec;
        dependency_wait();
        Vec y[kVectors];
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {  // asked for now, needed last
            const int v = threadIdx.x + j * kExpandThreads;
            if (v < group.count * vectors) {
                y[j] = load_vec(p.y + group.tokens[v / vectors] * p.y_stride + item.begin + v % vectors * kVec);
            }
        }
        prefetch_l1(next.entry);
        expand_item(p.lora, work.entry, p.expand, group, slice, n, item.extent, shared.weights, kWeightBytes, shared.tile,
                    shared.delta, kStride);
        if (i + gridDim.x < num_items) begin(next);
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            const int v = threadIdx.x + j * kExpandThreads;
            if (v >= group.count * vectors) continue;
            const int token = v / vectors, column = v % vectors * kVec;
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
                y[j].v[k] = from_float<elem>(to_float(y[j].v[k]) + shared.delta[token * kStride + column + k]);
            }
            store_vec(p.y + group.tokens[token] * p.y_stride + item.begin + column, y[j]);
        }
        __syncthreads();
        work = next;
    }
    dependency_wait();
}
