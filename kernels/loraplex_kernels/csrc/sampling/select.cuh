// Selection without sorting the vocabulary: which tokens are the k likeliest, which make up a probability mass.
//
// Tokens are ranked by 52-bit keys (order of the value, then id), likelier first; keys differ, so ties fall to the lower
// id. Every set we look for is "keys up to a limit": the largest P such that measure(keys < P) < bound, measure being a
// count or a mass of 40-bit fixed-point weights. Integers add up to the same sum in any order: results are exact and do
// not depend on how threads share the row.
//
// A list in shared memory takes the likeliest tokens, is sorted (bitonic) and summed up. If it cannot hold the answer
// (flat distributions), `narrow` first closes in on the limit, 2 bits in each pass over the row.
// Loops over the row that have several callers are not inlined: their data is in shared memory.
// Source: Alabi et al., "Fast k-selection algorithms for graphics processing units", JEA 17 (2012), for the bisection.
#pragma once
#include "sampling/order.cuh"
#include "sampling/row.cuh"

constexpr int kThreads = THREADS;
constexpr int kCapacity = CAPACITY;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPerThread = (kCapacity + kThreads - 1) / kThreads;
constexpr int kPivots = 3;
static_assert(kThreads % kWarp == 0, "whole warps");
static_assert((kCapacity & (kCapacity - 1)) == 0, "bitonic sort");

constexpr int kIdBits = 20;
constexpr u32 kIdMask = (1u << kIdBits) - 1;
constexpr u64 kNoKey = ~0ull;
constexpr u32 kImpossible = 0x7f800000u;  // order of a value of -inf
constexpr float kWeightOne = 0x1p40f;     // 2^20 tokens of it fit 63 bits

__device__ __forceinline__ u64 key_of(u32 order, int id) { return static_cast<u64>(order) << kIdBits | static_cast<u32>(id); }
__device__ __forceinline__ int id_of(u64 key) { return static_cast<int>(key & kIdMask); }
__device__ __forceinline__ u32 order_of(u64 key) { return static_cast<u32>(key >> kIdBits); }

// Orders as unsigned integers: of any float, rising (order.cuh); of a draw's value (0 at most), likelier first.
__device__ __forceinline__ u32 order_of_value(float v) { return __float_as_uint(v) & 0x7fffffffu; }
__device__ __forceinline__ float value_of(u64 key) { return -__uint_as_float(order_of(key)); }
__device__ __forceinline__ u64 weight_of(u64 key) { return static_cast<u64>(expf(value_of(key)) * kWeightOne); }

// How tokens are ranked: by value, tokens that cannot be drawn at `kImpossible`; or by logit, for reports.
struct Ranking {
    int vocab;
    bool by_logit;
    float best, temperature, least;

    __device__ __forceinline__ float value(float x) const {
        const float v = __fdiv_rn(__fsub_rn(x, best), temperature);
        return v < least ? negative_infinity() : v;
    }
    __device__ __forceinline__ u32 order(float x) const { return by_logit ? ~rising(x) : order_of_value(value(x)); }
    __device__ __forceinline__ u64 key(float x, int id) const { return id < vocab ? key_of(order(x), id) : kNoKey; }
};

struct Shared {
    u64 list[kCapacity];
    u64 scratch[kWarps];
    SampleRow row;
    Source source;
    Ranking ranking;
    int count;
};
__shared__ Shared shared;

// x[j] with x in registers: for loops over j that are not unrolled, which keeps rare code small.
__device__ __forceinline__ float pick(const float (&x)[kUnit], int j) {
    float found = x[0];
#pragma unroll
    for (int i = 1; i < kUnit; ++i) found = i == j ? x[i] : found;
    return found;
}

// Calls visit(base, x) for every unit of the row, its logits after constraints and penalties; entries beyond the
// vocabulary are anything. The next unit is on its way while one is visited.
template <class Visit>
__device__ __forceinline__ void each_unit(Visit visit) {
    const elem* logits = as_global(shared.source.logits);
    const int vocab = shared.source.vocab;
    const u8* mask = shared.source.mask;
    const bool is_special = shared.source.is_special;
    int base = threadIdx.x * kUnit;
    if (base >= vocab) return;
    Unit next = load_unit(logits, base, vocab);
    while (base < vocab) {
        const Unit unit = next;
        const int following = base + kThreads * kUnit;
        if (following < vocab) next = load_unit(logits, following, vocab);
        float x[kUnit];
#pragma unroll
        for (int j = 0; j < kUnit; ++j) x[j] = to_float(unit.v[j]);
        if (mask) {
            const u32 allowed = as_global(mask)[base / kUnit];
#pragma unroll
            for (int j = 0; j < kUnit; ++j)
                if (!(allowed >> j & 1)) x[j] = negative_infinity();
        }
        if (is_special) {
#pragma unroll 1
            for (int j = 0; j < kUnit && base + j < vocab; ++j) {
                const float logit = special_logit(shared.source, shared.row, pick(x, j), base + j);
#pragma unroll
                for (int i = 0; i < kUnit; ++i) x[i] = i == j ? logit : x[i];
            }
        }
        visit(base, x);
        base = following;
    }
}

__device__ __noinline__ u64 block_sum(u64 v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v += __shfl_xor_sync(kFullMask, v, mask);
    if (threadIdx.x % kWarp == 0) shared.scratch[threadIdx.x / kWarp] = v;
    __syncthreads();
    u64 total = 0;
    for (int w = 0; w < kWarps; ++w) total += shared.scratch[w];
    __syncthreads();
    return total;
}
__device__ __noinline__ u64 block_min(u64 v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v = min(v, __shfl_xor_sync(kFullMask, v, mask));
    if (threadIdx.x % kWarp == 0) shared.scratch[threadIdx.x / kWarp] = v;
    __syncthreads();
    u64 least = shared.scratch[0];
    for (int w = 1; w < kWarps; ++w) least = min(least, shared.scratch[w]);
    __syncthreads();
    return least;
}
// Sum of the values of the threads before this one.
__device__ __forceinline__ u64 sum_before(u64 v) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    u64 inclusive = v;
#pragma unroll
    for (int step = 1; step < kWarp; step <<= 1) {
        const u64 other = __shfl_up_sync(kFullMask, inclusive, step);
        if (lane >= step) inclusive += other;
    }
    if (lane == kWarp - 1) shared.scratch[warp] = inclusive;
    __syncthreads();
    u64 before = inclusive - v;
    for (int w = 0; w < warp; ++w) before += shared.scratch[w];
    __syncthreads();
    return before;
}

// The want-th smallest of one order per thread.
__device__ __noinline__ u32 kth_smallest(u32 order, int want) {
    u32 prefix = 0;  // the largest value that fewer than `want` are below
    for (u32 bit = 0x80000000u; bit; bit >>= 1)
        if (__syncthreads_count(order < (prefix | bit)) < want) prefix |= bit;
    return prefix;
}

// Sorts the first n entries of the list, n <= kCapacity.
__device__ __noinline__ void sort_list(int n) {
    int size = 2;
    while (size < n) size <<= 1;
    for (int i = n + threadIdx.x; i < size; i += kThreads) shared.list[i] = kNoKey;
    __syncthreads();
    for (int run = 2; run <= size; run <<= 1)
        for (int distance = run / 2; distance > 0; distance >>= 1) {
            for (int i = threadIdx.x; i < size / 2; i += kThreads) {
                const int low = 2 * i - (i & (distance - 1)), high = low + distance;
                const u64 a = shared.list[low], b = shared.list[high];
                if ((a > b) == ((low & run) == 0)) shared.list[low] = b, shared.list[high] = a;
            }
            __syncthreads();
        }
}

// Puts the keys in [begin, end) into the list, in any order, and returns how many there are, or more than fit.
__device__ __noinline__ int gather(u64 begin, u64 end) {
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
    const Ranking ranking = shared.ranking;
    bool is_full = false;  // stop counting then: atomics on one address are slow
    each_unit([&](int base, const float (&x)[kUnit]) {
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
            const u64 key = ranking.key(x[j], base + j);
            if (key < begin || key >= end || is_full) continue;
            const int at = atomicAdd(&shared.count, 1);
            is_full = at >= kCapacity;
            if (!is_full) shared.list[at] = key;
        }
    });
    __syncthreads();
    const int count = shared.count;
    __syncthreads();
    return count;
}

// Mass of the keys in the row up to a limit.
__device__ __noinline__ u64 mass_up_to(u64 limit) {
    const Ranking ranking = shared.ranking;
    u64 own = 0;
    each_unit([&](int base, const float (&x)[kUnit]) {
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
            const u64 key = ranking.key(x[j], base + j);
            if (key <= limit) own += weight_of(key);
        }
    });
    return block_sum(own);
}

__device__ __forceinline__ u64 measure_of(u64 key, bool by_mass) { return by_mass ? weight_of(key) : 1; }

// How many of the first n sorted entries have less than `bound` of the measure before them, `base` before the list.
__device__ __noinline__ int count_below(int n, bool by_mass, u64 base, u64 bound) {
    const int first = threadIdx.x * kPerThread, last = min(n, first + kPerThread);
    u64 own = 0;
    for (int i = first; i < last; ++i) own += measure_of(shared.list[i], by_mass);
    u64 before = base + sum_before(own), kept = 0;
    for (int i = first; i < last; ++i) {
        kept += before < bound;
        before += measure_of(shared.list[i], by_mass);
    }
    return static_cast<int>(block_sum(kept));
}

// Keys in [begin, end); measure of the keys before `begin`; counts of the keys before `begin` (below) and `end`
// (above).
struct Band {
    u64 begin, end, measure, below, above;
};

// Cuts a band in 4 and keeps the part that the limit is in.
__device__ __forceinline__ void narrow_once(Band& band, bool by_mass, u64 bound) {
    const Ranking ranking = shared.ranking;
    const u64 begin = band.begin, end = band.end, step = (end - begin + kPivots) / (kPivots + 1);
    u64 measures[kPivots] = {};
    u32 counts[kPivots] = {};
    each_unit([&](int base, const float (&x)[kUnit]) {
#pragma unroll 1
        for (int j = 0; j < kUnit; ++j) {
            const u64 key = ranking.key(pick(x, j), base + j);
            if (key >= end) continue;
            const u64 measure = measure_of(key, by_mass);
#pragma unroll
            for (int i = 0; i < kPivots; ++i)
                if (key < begin + (i + 1) * step) ++counts[i], measures[i] += measure;
        }
    });
    bool is_found = false;
#pragma unroll
    for (int i = 0; i < kPivots; ++i) {
        const u64 pivot = min(begin + (i + 1) * step, end), count = block_sum(counts[i]);
        const u64 measure = block_sum(measures[i]);
        if (is_found) continue;
        is_found = measure >= bound;
        if (is_found) band.end = pivot, band.above = count;
        else band.begin = pivot, band.below = count, band.measure = measure;
    }
}

// The largest P below `end` with measure(keys < P) < bound; bound > 0.
__device__ __noinline__ u64 narrow(bool by_mass, u64 bound, u64 end) {
    const Ranking ranking = shared.ranking;
    u64 own = 0;
    each_unit([&](int base, const float (&x)[kUnit]) {
#pragma unroll
        for (int j = 0; j < kUnit; ++j) own += ranking.key(x[j], base + j) < end;
    });
    Band band = {0, end, 0, 0, block_sum(own)};
    while (band.above - band.below > kCapacity) narrow_once(band, by_mass, bound);
    const int n = gather(band.begin, band.end);
    sort_list(n);
    const int kept = count_below(n, by_mass, band.measure, bound);
    const u64 limit = kept ? shared.list[kept - 1] : band.begin - (band.begin > 0);
    __syncthreads();
    return limit;
}
