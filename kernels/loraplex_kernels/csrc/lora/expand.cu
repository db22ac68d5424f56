// y[t, n] += scaling * scale[t] * (sum over planes of h[plane][t]) * B^T, or that delta itself, zeros where no adapter adapts
// an output: in fp32 for a kernel that adds it later, or in y for a product that accumulates behind it. The second half of
// LoRA at decode.
//
// Work item: (group of <= 8 tokens, run of outputs): begin = first output in the op's fused outputs, extent = how many;
// a run stays within a slice and starts on a multiple of 64. Grid: any; CTAs stride over the items. Block: 4 warps; of an
// item's run, warp w takes blocks w and w + 4 of 64 outputs. Once the way to the items' weights is known, warps meet only to
// stage h of ranks above 16.
// bf16: tensor cores (lora/expand_rows.cuh), B by way of shared memory (lora/expand_ring.cuh), whose first copies are under
// way before the kernel waits for h. fp32: scalar FMAs, the same outputs per lane.
// Shared memory: 4 warps x kAhead slots of 2 KiB, 8.25 KiB of h, 3.25 KiB of items. Alignment: y rows on 16 bytes;
// outputs % 8 == 0.
// Registers: 6 CTAs of 128 threads per SM, hence at most 80. Architectures: sm_80 and up.
#include "lora/expand_output.cuh"
#include "lora/expand_ring.cuh"
#include "lora/expand_rows.cuh"

constexpr int kCtasPerSm = 6;  // lora_paths.py's EXPAND_CTAS_PER_SM

struct Shared {
#ifndef LORAPLEX_FP32
    RingSlots ring;
    HiddenTile hidden;
#endif
    ExpandBatch resolved;
};

// What a warp does of an item.
struct AddItem {
    const Params& p;
    const ExpandBatch& resolved;
#ifndef LORAPLEX_FP32
    Ring& ring;
    HiddenTile& hidden;
#endif
    int which;

    template <Rows kRows>
    __device__ __forceinline__ void run() const {
        const Block* blocks = resolved.blocks + which * kItemBlocks + threadIdx.x / kWarp;
#ifndef LORAPLEX_FP32
        if constexpr (kRows == Rows::kOne || kRows == Rows::kUnaligned) {
            __syncthreads();  // h of the item before is done with
            stage_hidden(p.expand, resolved.slices[which], resolved.batch.groups[which][0], hidden);
            __syncthreads();
        }
#endif
        if ((kRows == Rows::kNone && p.accumulates) || blocks[0].rows == 0) return;
        const int n = resolved.batch.items[which].begin + threadIdx.x / kWarp * kBlockRows;
        const Target target = find_target(p, resolved.batch.groups[which][0], n);
#ifndef LORAPLEX_FP32
        if constexpr (kRows == Rows::kTwo || kRows == Rows::kFour) return add_at_once<kRows>(blocks, target);
#endif
        add_by_block<kRows>(blocks, target);
    }
#ifndef LORAPLEX_FP32
    // Small ranks leave a warp little else to wait behind: all that it needs of an item but B is asked for at once.
    template <Rows kRows>
    __device__ __forceinline__ void add_at_once(const Block* blocks, const Target& target) const {
        constexpr int kStep = kExpandWarps * kBlockRows, kPairs = kRows == Rows::kTwo ? kTwoPairs : kFourPairs;
        Before before[kWarpBlocks];
#pragma unroll
        for (int i = 0; i < kWarpBlocks; ++i) before[i] = load_before(p, target, i * kStep, blocks[i * kExpandWarps].rows);
        const Group& group = resolved.batch.groups[which][0];
        const Hidden<kPairs> hidden = load_hidden<kPairs>(p.expand, resolved.slices[which], group, threadIdx.x % 4 * 2);
        Fragments a;
#pragma unroll
        for (int i = 0; i < kWarpBlocks; ++i) {
            const int rows = blocks[i * kExpandWarps].rows;
            if (rows == 0) return;
            if constexpr (kRows == Rows::kTwo) {
                ring.take<kRows>(a);
                store_block(p, target, i * kStep, rows, before[i], block_delta(a, hidden));
            } else {
                if (i == 0) ring.take<kRows>(a);
                store_block(p, target, i * kStep, rows, before[i], block_delta(a, i, hidden));
            }
        }
    }
#endif
    template <Rows kRows>
    __device__ __forceinline__ void add_by_block(const Block* blocks, const Target& target) const {
#pragma unroll 1
        for (int i = 0; i < kItemBlocks; i += kExpandWarps) {
            const Block& block = blocks[i];
            if (block.rows == 0) return;
            prefetch_before(p, target, i * kBlockRows, block.rows);
            const Delta delta = block_delta_of<kRows>(block);
            in_order();  // until here y's registers are the products'
            const Before before = load_before(p, target, i * kBlockRows, block.rows);
            store_block(p, target, i * kBlockRows, block.rows, before, delta);
        }
    }
    template <Rows kRows>
    __device__ __forceinline__ Delta block_delta_of(const Block& block) const {
        const SliceInfo& slice = resolved.slices[which];
        if constexpr (kRows == Rows::kNone) return {};
#ifdef LORAPLEX_FP32
        return block_delta(p.lora, p.expand, resolved.batch.items[which], slice, resolved.batch.groups[which][0], block);
#else
        return block_delta(hidden, slice.rank, [&](int half, int k, Fragments& a) {
            if constexpr (kRows == Rows::kUnaligned) {
                load_unaligned(p.lora.pool, block, slice.rank, half, k, a);
            } else {
                ring.take<Rows::kOne>(a);
            }
        });
#endif
    }
};

extern "C" __global__ void __launch_bounds__(kExpandThreads, kCtasPerSm) lora_expand(const Params p) {
    __shared__ Shared shared;
    const ExpandBatch& resolved = shared.resolved;
    allow_dependents();
#ifndef LORAPLEX_FP32
    Ring ring(p.lora.pool, resolved, shared.ring);
#endif
    const Pair range = load_range(p.lora);
    const ItemWalk walk{static_cast<int>(range.x), static_cast<int>(range.y)};
#pragma unroll 1
    for (int first = 0; walk.has(first, 0); first += kBatch) {
        const int count = resolve(p.lora, p.expand, walk, first, shared.resolved);
#ifndef LORAPLEX_FP32
        ring.start(count);
#endif
        dependency_wait();
#pragma unroll 1
        for (int which = 0; which < count; ++which) {
#ifdef LORAPLEX_FP32
            const AddItem add{p, resolved, which};
#else
            const AddItem add{p, resolved, ring, shared.hidden, which};
#endif
            with_rows(rows_of(resolved.slices[which].rank), add);
        }
        __syncthreads();
    }
    dependency_wait();
}
