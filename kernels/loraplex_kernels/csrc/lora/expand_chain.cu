// What lora/expand.cu computes, for rows whose products add up a list of adapters, and for ranks above 256: y is read and
// written once, whatever the length of the list.
//
// Work item: (group of <= 8 tokens with the same list, run of <= 256 outputs): group = the record of the list's first adapter,
// behind which lie those of the others, as many for every group of a launch; the range says how many. Records' tokens are the
// terms' rows of h and scale. A warp keeps the sum of a block of 64 outputs in registers while it goes through the list in
// order; lists are padded with no adapter, which costs a place in a batch. Grid: any; CTAs stride over the items. Block: 4 warps.
// bf16: as lora/expand.cu, but h of as many terms as fit is staged at a time, for all ranks. fp32: scalar FMAs.
// Shared memory: 4 warps x kAhead slots of 2 KiB, 16.25 KiB of h, 5.75 KiB of items. Alignment: y rows on 16 bytes;
// outputs % 8 == 0.
// Registers: 4 CTAs of 128 threads per SM, hence at most 128. Architectures: sm_80 and up.
#ifndef LORAPLEX_CHAINS
#define LORAPLEX_CHAINS
#endif
#include "lora/expand_output.cuh"
#include "lora/expand_ring.cuh"
#include "lora/expand_rows.cuh"

constexpr int kCtasPerSm = 4;    // chain_lora.py's CHAIN_CTAS_PER_SM
constexpr int kTermsShift = 24;  // of a range's number of items: the terms of every group

struct Shared {
#ifndef LORAPLEX_FP32
    RingSlots ring;
    HiddenTile hidden;
#endif
    ExpandBatch resolved;
};

// A CTA's chains, term by term; a batch holds whole chains.
struct ChainWalk {
    int first_item, num_chains, terms;

    __device__ __forceinline__ int room() const { return kBatch / terms * terms; }
    __device__ __forceinline__ int number(int at) const { return item_index(at / terms); }
    __device__ __forceinline__ bool has(int first, int which) const {
        return which < room() && number(first + which) < num_chains;
    }
    __device__ __forceinline__ Item load(const LoraTables& t, int first, int which) const {
        Item item = load_item(t, first_item + number(first + which));
        item.group += (first + which) % terms;
        item.adapter = static_cast<int>(load_lasting4(&t.groups[item.group].adapter));
        return item;
    }
    __device__ __forceinline__ int left(int first) const {
        return min(room(), items_left(num_chains, first / terms, kBatch) * terms);
    }
};

__device__ __forceinline__ void add(Delta& sum, const Delta& term) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
#pragma unroll
        for (int j = 0; j < kLaneRows; ++j) sum.v[which][j] += term.v[which][j];
    }
}

// What a warp adds of one term.
struct AddTerm {
    const Params& p;
    const ExpandBatch& resolved;
#ifndef LORAPLEX_FP32
    Ring& ring;
    const HiddenTile& hidden;
    int begin;  // of the term's h
#endif
    int which;
    Delta& sum;

    template <Rows kRows>
    __device__ __forceinline__ void run() const {
        if constexpr (kRows != Rows::kNone) {
            const Block& block = resolved.blocks[which * kItemBlocks + threadIdx.x / kWarp];
            if (block.rows > 0) add(sum, delta_of<kRows>(block));
        }
    }
    template <Rows kRows>
    __device__ __forceinline__ Delta delta_of(const Block& block) const {
        const SliceInfo& slice = resolved.slices[which];
#ifdef LORAPLEX_FP32
        return block_delta(p.lora, p.expand, resolved.batch.items[which], slice, resolved.batch.groups[which][0], block);
#else
        if constexpr (kRows == Rows::kTwo || kRows == Rows::kFour) {
            Fragments a;
            ring.take<kRows>(a);
            if constexpr (kRows == Rows::kTwo) {
                return block_delta(a, read_hidden<kTwoPairs>(hidden, slice.rank, 0, begin));
            } else {
                return block_delta(a, 0, read_hidden<kFourPairs>(hidden, slice.rank, 0, begin));
            }
        } else {
            return block_delta(
                hidden, slice.rank,
                [&](int half, int k, Fragments& a) {
                    if constexpr (kRows == Rows::kUnaligned) {
                        load_unaligned(p.lora.pool, block, slice.rank, half, k, a);
                    } else {
                        ring.take<Rows::kOne>(a);
                    }
                },
                begin);
        }
#endif
    }
};

#ifndef LORAPLEX_FP32
__device__ __forceinline__ int words_of(int rank) { return rank == 0 ? 0 : kGroupTokens * stride_of(rank); }

// Stages h of terms [first, stop) of a chain behind each other; the terms' tokens go round the block's eighths.
__device__ __forceinline__ void stage_terms(const Params& p, const ExpandBatch& resolved, int first, int stop,
                                            HiddenTile& tile) {
    int begin = 0, turn = 0;
#pragma unroll 1
    for (int which = first; which < stop; ++which) {
        const SliceInfo& slice = resolved.slices[which];
        if (slice.rank == 0) continue;
        const Group& group = resolved.batch.groups[which][0];
        stage_hidden(p.expand, slice, group, tile, begin, turn);
        begin += words_of(slice.rank), turn = (turn + kGroupTokens - group.count) % kGroupTokens;
    }
}
// The end of the terms from `first` on whose h fits the tile at a time.
__device__ __forceinline__ int fitting(const ExpandBatch& resolved, int first, int end) {
    int stop = first, words = 0;
    while (stop < end && words + words_of(resolved.slices[stop].rank) <= kHiddenWords) {
        words += words_of(resolved.slices[stop].rank);
        ++stop;
    }
    return stop;
}
#endif

// Whether any term adapts the chain's outputs.
__device__ __forceinline__ bool is_live(const ExpandBatch& resolved, int first, int end) {
    for (int which = first; which < end; ++which)
        if (resolved.slices[which].rank > 0) return true;
    return false;
}

extern "C" __global__ void __launch_bounds__(kExpandThreads, kCtasPerSm) lora_expand_chain(const Params p) {
    __shared__ Shared shared;
    const ExpandBatch& resolved = shared.resolved;
    allow_dependents();
#ifndef LORAPLEX_FP32
    Ring ring(p.lora.pool, resolved, shared.ring);
#endif
    const Pair range = load_range(p.lora);
    const int num_chains = static_cast<int>(range.y & ((1u << kTermsShift) - 1));
    const ChainWalk walk{static_cast<int>(range.x), num_chains, max(1, static_cast<int>(range.y >> kTermsShift))};
#pragma unroll 1
    for (int first = 0; walk.has(first, 0); first += walk.room()) {
        const int count = resolve(p.lora, p.expand, walk, first, shared.resolved);
#ifndef LORAPLEX_FP32
        ring.start(count);
#endif
        dependency_wait();
#pragma unroll 1
        for (int chain = 0; chain < count; chain += walk.terms) {
            const int end = chain + walk.terms;
            if (p.accumulates && !is_live(resolved, chain, end)) continue;
            const int n = resolved.batch.items[chain].begin + threadIdx.x / kWarp * kBlockRows;
            const int rows = resolved.blocks[chain * kItemBlocks + threadIdx.x / kWarp].rows;
            const Target target = find_target(p, resolved.batch.groups[chain][0], n);
            prefetch_before(p, target, 0, rows);
            Delta sum = {};
#ifdef LORAPLEX_FP32
            for (int which = chain; which < end; ++which)
                with_rows(rows_of(resolved.slices[which].rank), AddTerm{p, resolved, which, sum});
#else
#pragma unroll 1
            for (int which = chain; which < end;) {
                const int stop = fitting(resolved, which, end);
                __syncthreads();  // h before is done with
                stage_terms(p, resolved, which, stop, shared.hidden);
                __syncthreads();
                int begin = 0;
#pragma unroll 1
                for (; which < stop; ++which) {
                    const int rank = resolved.slices[which].rank;
                    with_rows(rows_of(rank), AddTerm{p, resolved, ring, shared.hidden, begin, which, sum});
                    begin += words_of(rank);
                }
            }
#endif
            in_order();  // until here y's registers are the products'
            store_block(p, target, 0, rows, load_before(p, target, 0, rows), sum);
        }
        __syncthreads();
    }
    dependency_wait();
}
