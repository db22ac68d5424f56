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
    for (int i = blockIdx.x; i < num_items; i += gridDim.x) {
        const Work work = fetch_work(p.lora, i);
        begin(work);
        const Item& item = work.item;
        const Group& group = p.lora.groups[item.group];
        const int slice = slice_of(p.expand, item.begin), n = item.begin - p.expand.slice_begin[slice];
        const int vectors = item.extent / kVec;
        dependency_wait();
        Vec y[kVectors];
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {  // asked for now, needed last
            const int token = (threadIdx.x + j * kExpandThreads) / (kRun / kVec), v = threadIdx.x % (kRun / kVec);
            if (token < group.count && v < vectors) {
                y[j] = load_vec(p.y + group.tokens[token] * p.y_stride + item.begin + v * kVec);
            }
        }
        expand_item(p.lora, work.entry, p.expand, group, slice, n, item.extent, shared.weights, kWeightBytes, shared.tile,
                    shared.delta, kStride);
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            const int token = (threadIdx.x + j * kExpandThreads) / (kRun / kVec), v = threadIdx.x % (kRun / kVec);
            if (token >= group.count || v >= vectors) continue;
            const int column = v * kVec;
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
                y[j].v[k] = from_float<elem>(to_float(y[j].v[k]) + shared.delta[token * kStride + column + k]);
            }
            store_vec(p.y + group.tokens[token] * p.y_stride + item.begin + column, y[j]);
        }
        __syncthreads();
    }
    dependency_wait();
}
