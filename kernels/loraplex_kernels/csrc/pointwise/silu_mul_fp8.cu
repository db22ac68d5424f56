// silu_mul.cu, and its result in e4m3 for the product that follows: the rounding is the same. SHARES CTAs share a row.
//
// A row on one multiprocessor takes longer than its numbers take to come: exponentials alone are a microsecond, and others idle.
// A cluster's CTAs compute equal parts of the row and tell each other their largest value; with GROUPS there is nothing to tell,
// and no cluster. Grid: SHARES CTAs a row. Block: THREADS, each holding kVecs vectors of 16 bytes of the result in registers.
// Shared memory: one float per warp, and what the CTAs of a cluster tell. Alignment: WIDTH % (16 / sizeof(elem)) == 0.
// Registers: 1024 threads per SM, hence at most 64. Architectures: sm_90 and up; sm_80 with SHARES 1 or GROUPS.
// Measured on one H200, 14,336 columns, us at 1, 64 and 192 rows: a CTA a row 4.2, 4.7 and 8.2, two of 448 threads 3.5, 3.8 and 6.9,
// four 2.8, 4.9 and 8.7; with GROUPS four of 256 threads 2.9, 3.7 and 6.4.
// Sources: silu_mul.cu, fp8.cuh.
#include "cluster.cuh"
#include "pointwise/silu_mul_fp8.cuh"

constexpr int kThreads = THREADS;
constexpr int kWarps = kThreads / kWarp;
constexpr u32 kShares = SHARES;
constexpr int kShareVecs = (kWidth / kVec + kShares * kGroupLanes - 1) / (kShares * kGroupLanes) * kGroupLanes;
constexpr int kVecs = (kShareVecs + kThreads - 1) / kThreads;
static_assert(kThreads % kWarp == 0 && kThreads <= 1024, "whole warps");
static_assert(kGroups || kShares <= 8, "larger clusters need an attribute");

struct Shared {
    u64 landed;             // mbarrier of `largest`
    Pair largest[kShares];  // of each CTA of the cluster; a float and nothing
    float maxima[kWarps];
};

// A CTA's largest value -> the row's.
__device__ __forceinline__ float row_max(float largest, Shared& shared, u32 share) {
    largest = block_max<kThreads>(largest, shared.maxima);
    if constexpr (kShares == 1) return largest;
    const SharedAddress landed = address_of(&shared.landed);
    cluster_wait<kShares>();  // all CTAs run, and expect what is stored now
    if (threadIdx.x < kShares)
        store_peer<kShares>(address_of(&shared.largest[share]), landed, threadIdx.x, Pair{__float_as_uint(largest), 0});
    await_bytes<kShares>(landed);
#pragma unroll
    for (u32 peer = 0; peer < kShares; ++peer) largest = fmaxf(largest, __uint_as_float(shared.largest[peer].x));
    return largest;
}

extern "C" __global__ void LORAPLEX_CLUSTER __launch_bounds__(kThreads, 1024 / kThreads) silu_mul_fp8(const Params p) {
    LORAPLEX_SHARED(Shared, shared);
    if constexpr (!kGroups && kShares > 1) {
        if (threadIdx.x == 0) {
            expect_bytes<kShares>(address_of(&shared.landed), sizeof(shared.largest));
            reveal_expected();
        }
        __syncwarp();
        cluster_arrive<kShares>();
    }
    allow_dependents();
    dependency_wait();
    const i64 row = blockIdx.x / kShares;
    const u32 share = blockIdx.x % kShares;
    const int first = static_cast<int>(share) * kShareVecs, end = min(first + kShareVecs, kWidth / kVec);
    Vec values[kVecs];
    float largest[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
        const int at = first + i * kThreads + static_cast<int>(threadIdx.x);
        values[i] = at < end ? activate(p, row, at * kVec) : Vec{};
        largest[i] = largest_of(values[i]);
        if (at < end && p.out) store_vec(p.out + row * kWidth + at * kVec, values[i]);
    }
    find_largest(largest, [&](float own) { return row_max(own, shared, share); });
    if (!kGroups && threadIdx.x == 0 && share == 0) p.quantised.scales[row] = largest[0] / kLargestCode;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
        const int at = first + i * kThreads + static_cast<int>(threadIdx.x);
        if (at < end) store_quantised<kWidth>(values, i, row, at * kVec, largest, p.quantised);
    }
}
