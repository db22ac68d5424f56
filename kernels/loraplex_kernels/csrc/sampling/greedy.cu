// The likeliest token of each row, the lowest id among equals: what sample.cu draws of rows that are greedy and ask nothing else.
//
// A row is 256 KB in bf16, too much for one multiprocessor while others idle: the CTAs of a cluster take every SHARES-th part of it
// and tell the first of them what they found. Grid: SHARES CTAs a row. Block: THREADS, each with kBatch loads on their way.
// Shared memory: 8 bytes per warp and CTA. Rows start on 16 bytes if vocab % 8 == 0.
// Registers: 2048 threads per SM, hence at most 32. Architectures: sm_90 and up; sm_80 with SHARES 1.
// Source: sample.cu.
#include "cluster.cuh"
#include "sampling/order.cuh"
#include "sampling/row.cuh"

constexpr int kThreads = THREADS;
constexpr int kWarps = kThreads / kWarp;
constexpr u32 kShares = SHARES;
constexpr int kBatch = 2;
static_assert(kThreads % kWarp == 0 && kShares <= 8, "whole warps; larger clusters need an attribute");

struct Params {
    const elem* logits;  // [rows, stride]; tokens from vocab on cannot be drawn
    const int* slots;    // [rows]
    int* drawn;          // [2, rows]: tokens, and what became of the draw, as sample.cu says
    int* last_sampled;   // [slots]
    int vocab;
    int stride;  // a multiple of 8 wherever vocab is
};
static_assert(sizeof(Params) == 40, "row_params.py mirrors it");

constexpr int kNotFinite = 0, kValid = 1, kNothingLeft = 2;
constexpr u32 kInfinite = 0xff800000u;  // order of infinity

struct Shared {
    u64 landed;              // mbarrier of `of_share`
    Pair of_share[kShares];  // in the first CTA: what each found, a key's halves
    u64 of_warp[kWarps];
};

// The smaller of two keys is the likelier token or, of equals, the lower id; a NaN's comes before all.
__device__ __forceinline__ u64 key_of(u32 order, u32 token) { return static_cast<u64>(~order) << 32 | token; }

struct Best {
    float x = negative_infinity();
    int token;
    bool is_nan = false;

    __device__ __forceinline__ void consider(float v, int id) {
        if (v > x && !is_nan) x = v, token = id;
        if (v != v && !is_nan) is_nan = true, token = id;
    }
    __device__ __forceinline__ u64 key() const { return key_of(is_nan ? ~0u : rising(x), token); }
};

__device__ __forceinline__ u64 least_of_warp(u64 v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v = min(v, __shfl_xor_sync(kFullMask, v, mask));
    return v;
}

// The best of this CTA's part of a row.
__device__ __forceinline__ u64 find_best(const elem* logits, int vocab, u32 share) {
    constexpr int kStep = kThreads * kShares * kUnit;
    const int first = static_cast<int>(share * kThreads + threadIdx.x) * kUnit;
    Best best;
    best.token = min(first, vocab - 1);
    for (int base = first; base < vocab; base += kBatch * kStep) {
        Unit units[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (base + i * kStep < vocab) units[i] = load_unit(logits, base + i * kStep, vocab);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int at = base + i * kStep;
#pragma unroll
            for (int j = 0; j < kUnit; ++j)
                if (at + j < vocab) best.consider(to_float(units[i].v[j]), at + j);
        }
    }
    return best.key();
}

extern "C" __global__ void LORAPLEX_CLUSTER __launch_bounds__(kThreads, 2048 / kThreads) greedy(const Params p) {
    LORAPLEX_SHARED(Shared, shared);
    const SharedAddress landed = address_of(&shared.landed);
    const u32 row = blockIdx.x / kShares, share = blockIdx.x % kShares;
    if constexpr (kShares > 1) {
        if (share == 0 && threadIdx.x == 0) {
            expect_bytes<kShares>(landed, sizeof(shared.of_share));
            reveal_expected();
        }
        __syncwarp();
        cluster_arrive<kShares>();
    }
    allow_dependents();
    dependency_wait();
    u64 least = least_of_warp(find_best(as_global(p.logits) + static_cast<i64>(row) * p.stride, p.vocab, share));
    if (threadIdx.x % kWarp == 0) shared.of_warp[threadIdx.x / kWarp] = least;
    __syncthreads();
    if constexpr (kShares > 1) cluster_wait<kShares>();  // the first CTA runs, and expects what is stored now
    if (threadIdx.x >= kWarp) return;
    least = least_of_warp(shared.of_warp[threadIdx.x % kWarps]);
    if constexpr (kShares > 1) {
        if (threadIdx.x == 0)
            store_peer<kShares>(address_of(&shared.of_share[share]), landed, 0,
                                Pair{static_cast<u32>(least >> 32), static_cast<u32>(least)});
        if (share != 0) return;
        await_bytes<kShares>(landed);
        const Pair found = shared.of_share[threadIdx.x % kShares];
        least = least_of_warp(static_cast<u64>(found.x) << 32 | found.y);
    }
    if (threadIdx.x != 0) return;
    const u32 order = ~static_cast<u32>(least >> 32);
    const int token = static_cast<int>(least), rows = gridDim.x / kShares;
    p.drawn[row] = token;
    const bool is_finite = order < kInfinite && order > ~kInfinite;
    p.drawn[rows + row] = is_finite ? kValid : order == ~kInfinite ? kNothingLeft : kNotFinite;
    p.last_sampled[as_global(p.slots)[row]] = token;
}
