// out = silu(gate + delta_gate) * (up + delta_up): the expand of gate_up folded into the pointwise kernel that follows
// its GEMM (lora_expand.cuh, silu.cuh). Groups of adapter -1 carry the rows without one: no weights, no delta.
//
// Work item: begin = first output, extent = outputs of both slices. Grid: any; CTAs stride over the items. Block: 4 warps;
// of an item's run, warp w takes every fourth block of 64 outputs, of gate and of up. Shared memory: 18 KiB of h and 3 KiB of items.
// Alignment: rows on 16 bytes; width % 8 == 0.
// Registers: 3 CTAs of 128 threads per SM, hence at most 168. Architectures: sm_80 and up.
#include "lora_expand.cuh"
#include "silu.cuh"

struct Params {
    LoraTables lora;
    ExpandParams expand;
    const elem* gate_up;  // [tokens, 2 * width]
    elem* out;            // [tokens, width]
    int width;
    int reserved;
};
static_assert(sizeof(Params) == 128, "params.py mirrors it");

// A projection's sums for this lane's two tokens.
struct Sums {
    Octet v[2];
};
__device__ __forceinline__ Sums load_sums(const elem* from, int width, const Group& group, bool is_live,
                                          const Delta& delta) {
    Sums sums;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        const int token = lane_token(group, which);
        sums.v[which] = load_sum(from + static_cast<i64>(token) * 2 * width, is_live && token >= 0, delta, which);
    }
    return sums;
}

struct Shared {
    ExpandBatch resolved;
    HiddenTile hidden[2];
};

struct FinishItem {
    const Params& p;
    Shared& shared;
    int number;
    template <Rows kRows>
    __device__ __forceinline__ void run() const;
};

template <Rows kRows>
__device__ __forceinline__ void FinishItem::run() const {
    const Item& item = shared.resolved.batch.items[number];
    const Group& group = shared.resolved.batch.groups[number];
    const SliceInfo(&slices)[2] = shared.resolved.slices[number];
    bool is_staged = false;
#pragma unroll 1
    for (int index = threadIdx.x / kWarp; index * kBlockRows < item.extent || !is_staged; index += kExpandWarps) {
        const int rows = min(kBlockRows, item.extent - index * kBlockRows);
        Block gate = begin_block<kRows, 0>(p.lora, shared.resolved, number, index, slices[0], rows);
        Block up = begin_block<kRows, 1>(p.lora, shared.resolved, number, kItemBlocks / 2 + index, slices[1], rows);
        const bool is_live = lane_row() < rows;
        const int n = item.begin + index * kBlockRows + lane_row();
        if (!is_staged) {
            dependency_wait();
#pragma unroll
            for (int which = 0; which < 2; ++which) {
                const int token = lane_token(group, which);
                if (!is_live || token < 0) continue;
                prefetch_to_l1(p.gate_up + static_cast<i64>(token) * 2 * p.width + n);
                prefetch_to_l1(p.gate_up + (static_cast<i64>(token) * 2 + 1) * p.width + n);
            }
            if constexpr (kRows != Rows::kNone) {
#pragma unroll 1
                for (int part = 0; part < 2; ++part)
                    if (slices[part].rank > 0) stage_hidden(p.expand, slices[part], group, shared.hidden[part]);
                __syncthreads();
            }
            is_staged = true;
        }
        const Sums gates =
            load_sums(p.gate_up + n, p.width, group, is_live, finish_block<kRows, 0>(p.lora, gate, shared.hidden[0]));
        const Sums ups =
            load_sums(p.gate_up + p.width + n, p.width, group, is_live, finish_block<kRows, 1>(p.lora, up, shared.hidden[1]));
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            const int token = lane_token(group, which);
            if (!is_live || token < 0) continue;
            Octet out;
#pragma unroll
            for (int j = 0; j < kLaneRows; ++j) out.set(j, silu_mul_value(gates.v[which].get(j), ups.v[which].get(j)));
            store_octet(p.out + static_cast<i64>(token) * p.width + n, out);
        }
    }
    if constexpr (kRows != Rows::kNone) __syncthreads();
}

// One way for both projections: where their ranks want different ones, the way that takes any.
__device__ __forceinline__ Rows rows_of_both(const SliceInfo (&slices)[2]) {
    const Rows gate = rows_of(slices[0].rank), up = rows_of(slices[1].rank);
    return gate == up || up == Rows::kNone ? gate : gate == Rows::kNone ? up : Rows::kUnaligned;
}

extern "C" __global__ void __launch_bounds__(kExpandThreads, 3) lora_silu_mul(const Params p) {
    __shared__ Shared shared;
    allow_dependents();
    const int num_items = p.lora.range[1];
    for (int first = 0; item_index(first) < num_items; first += kBatch) {
        const int count = resolve<true>(p.lora, p.expand, first, num_items, shared.resolved);
        for (int which = 0; which < count; ++which)
            with_rows(rows_of_both(shared.resolved.slices[which]), FinishItem{p, shared, which});
        __syncthreads();
    }
    dependency_wait();
}
