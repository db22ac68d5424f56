// y[t, n] += delta[t][n] (lora_expand.cuh), or delta[t][n] itself, zeros where no adapter adapts an output: in fp32 for a kernel
// that adds it later, or in y for a product that accumulates behind it.
//
// Grid: any; CTAs stride over the items. Block: 4 warps; of an item's run, warp w takes every fourth block of 64 outputs, or
// every fourth pair of them where the rank is so small that a block's loads are few. Shared memory: 9 KiB of h and
// 3 KiB of items. Alignment: y rows on 16 bytes;
// outputs % 8 == 0.
// Registers: 4 CTAs of 128 threads per SM, hence at most 128. Architectures: sm_80 and up.
#include "lora_expand.cuh"

struct Params {
    LoraTables lora;
    ExpandParams expand;
    elem* y;       // [tokens, y_stride]
    float* delta;  // [tokens, y_stride], or null: y is written
    i64 y_stride;
    int accumulates;  // y is added to
    int reserved;
};
static_assert(sizeof(Params) == 136, "params.py mirrors it");

// Asks for this lane's part of y of a block: needed last, behind everything else.
__device__ __forceinline__ void prefetch_rows(const Params& p, const Group& group, int n, int rows) {
    if (!p.accumulates) return;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        const int token = lane_token(group, which);
        if (token >= 0 && lane_row() < rows) prefetch_to_l1(p.y + token * p.y_stride + n + lane_row());
    }
}

__device__ __forceinline__ void add_block(const Params& p, const Group& group, int n, const Block& block,
                                          const Delta& delta) {
    if (lane_row() >= block.rows) return;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        const int token = lane_token(group, which);
        const i64 at = token * p.y_stride + n + lane_row();
        if (token < 0) continue;
        if (p.accumulates) {
            store_octet(p.y + at, load_sum(p.y + at, delta, which));
        } else if (p.delta == nullptr) {
            store_octet(p.y + at, octet_of(delta, which));
        } else {
#pragma unroll
            for (int j = 0; j < kLaneRows; j += 4) {
                const float* v = delta.v[which] + j;
                *reinterpret_cast<Quad*>(p.delta + at + j) = {__float_as_uint(v[0]), __float_as_uint(v[1]),
                                                              __float_as_uint(v[2]), __float_as_uint(v[3])};
            }
        }
    }
}

struct Shared {
    ExpandBatch resolved;
    HiddenTile hidden;
};

struct AddItem {
    const Params& p;
    Shared& shared;
    int which;
    template <Rows kRows>
    __device__ __forceinline__ void run() const;
};

template <Rows kRows>
__device__ __forceinline__ void AddItem::run() const {
    constexpr bool kIsPair = is_early(kRows, 1);  // two blocks are on their way at a time
    constexpr int kUnit = kIsPair ? 2 : 1;
    const Item& item = shared.resolved.batch.items[which];
    const Group& group = shared.resolved.batch.groups[which];
    const SliceInfo& slice = shared.resolved.slices[which];
    if (kRows == Rows::kNone && p.accumulates) return;
    bool is_staged = false;
#pragma unroll 1
    for (int index = threadIdx.x / kWarp * kUnit; index * kBlockRows < item.extent || !is_staged;
         index += kExpandWarps * kUnit) {
        const int rows = item.extent - index * kBlockRows;
        Block first = begin_block<kRows, 0>(p.lora, shared.resolved, which, index, slice, min(kBlockRows, rows)), second;
        if constexpr (kIsPair)
            second = begin_block<kRows, 1>(p.lora, shared.resolved, which, index + 1, slice,
                                           min(kBlockRows, rows - kBlockRows));
        if (!is_staged) dependency_wait();
        const int n = item.begin + index * kBlockRows;
        prefetch_rows(p, group, n, rows);
        if constexpr (kIsPair) prefetch_rows(p, group, n + kBlockRows, rows - kBlockRows);
        if (!is_staged) {
            if constexpr (kRows != Rows::kNone) stage_hidden(p.expand, slice, group, shared.hidden);
            __syncthreads();
            is_staged = true;
        }
        add_block(p, group, n, first, finish_block<kRows, 0>(p.lora, first, shared.hidden));
        if constexpr (kIsPair) add_block(p, group, n + kBlockRows, second, finish_block<kRows, 1>(p.lora, second, shared.hidden));
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(kExpandThreads, 4) lora_expand(const Params p) {
    __shared__ Shared shared;
    allow_dependents();
    const int num_items = p.lora.range[1];
    for (int first = 0; item_index(first) < num_items; first += kBatch) {
        const int count = resolve(p.lora, p.expand, first, num_items, shared.resolved);
        for (int which = 0; which < count; ++which)
            with_rows(rows_of(shared.resolved.slices[which].rank), AddItem{p, shared, which});
        __syncthreads();
    }
    dependency_wait();
}
