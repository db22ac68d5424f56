// Quantises a row that a block holds in registers to e4m3: codes, and what they are multiplied by. A scale belongs to the row
// or, with GROUPS, to each 128 columns, as products with weights in blocks of 128 x 128 take it.
//
// The largest value of a group becomes 448, e4m3's largest. A NaN or an infinity makes a NaN of its code, so that products of
// the row are NaN. Source: Micikevicius et al., arXiv:2209.05433; groups as in DeepSeek-V3, arXiv:2412.19437.
#pragma once
#include "common.cuh"

#ifdef GROUPS
constexpr bool kGroups = true;
#else
constexpr bool kGroups = false;
#endif
constexpr float kLargestCode = 448.f;
constexpr float kLeastScaled = 0x1p-100f;  // a group's largest value counts as at least this: the inverse stays finite
constexpr int kGroup = 128;
constexpr int kGroupLanes = kGroup / kVec;  // neighbours of one warp
static_assert(kGroupLanes <= kWarp, "a group's columns lie in one warp");

// Two values as e4m3, the first in the low byte; rounded to nearest even, at most 448.
#if !defined(LORAPLEX_HOST) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
__device__ __forceinline__ u16 e4m3_pair(float low, float high) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}
#else
__device__ __forceinline__ u32 e4m3_bits(float v) {
    const u32 bits = __float_as_uint(v), sign = bits >> 24 & 0x80u;
    if (v != v) return 0x7fu;
    const float size = fminf(__uint_as_float(bits & 0x7fffffffu), kLargestCode);
    // Below 2^-6 steps are 2^-9 each; the sum's last bits are their number. 8 of them are 2^-6's code, too.
    if (size < 0x1p-6f) return sign | (__float_as_uint(size * 512.f + 0x1.8p23f) & 0xfu);
    const u32 wide = __float_as_uint(size);
    return sign | ((wide + 0x7ffffu + (wide >> 20 & 1u)) >> 20) - (120u << 3);
}
__device__ __forceinline__ u16 e4m3_pair(float low, float high) {
    return static_cast<u16>(e4m3_bits(low) | e4m3_bits(high) << 8);
}
#endif

struct alignas(kVec) Codes {
    u16 pairs[kVec / 2];
};

// Where a row's codes and scales go.
struct Quantised {
    u8* codes;         // [rows, width]
    float* scales;     // [1, scale_stride]; with GROUPS [ceil(width / 128), scale_stride]
    int scale_stride;  // rows that have room
    int reserved;
};
static_assert(sizeof(Quantised) == 24, "params.py mirrors it");

template <int kThreads>
__device__ __forceinline__ float block_max(float v, float* scratch) {
    constexpr int kWarps = kThreads / kWarp;
    v = warp_max(v);
    if constexpr (kWarps == 1) return v;
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = v;
    __syncthreads();
    float largest = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, scratch[w]);
    return largest;
}

__device__ __forceinline__ float largest_of(const Vec& values) {
    float largest = 0.f;
#pragma unroll
    for (int j = 0; j < kVec; ++j) largest = fmaxf(largest, fabsf(to_float(values.v[j])));
    return largest;
}

__device__ __forceinline__ float group_max(float v) {
#pragma unroll
    for (int mask = kGroupLanes / 2; mask > 0; mask >>= 1) v = fmaxf(v, __shfl_xor_sync(kFullMask, v, mask));
    return v;
}

__device__ __forceinline__ void store_codes(const Vec& values, float largest, u8* to) {
    const float inverse = kLargestCode / largest;
    Codes codes;
#pragma unroll
    for (int j = 0; j < kVec; j += 2)
        codes.pairs[j / 2] = e4m3_pair(to_float(values.v[j]) * inverse, to_float(values.v[j + 1]) * inverse);
    *reinterpret_cast<Codes*>(to) = codes;
}

// A vector of a row with GROUPS: a warp's lanes hold neighbours, and largest is their group's.
__device__ __forceinline__ void store_group(const Vec& values, i64 row, int column, int width, float largest,
                                            const Quantised& out) {
    if (column % kGroup == 0) out.scales[static_cast<i64>(column / kGroup) * out.scale_stride + row] = largest / kLargestCode;
    store_codes(values, largest, out.codes + row * width + column);
}

// The largest values of a thread's vectors -> with GROUPS of their groups, else the first is the row's, which row_max makes of the
// thread's. All threads call it.
template <int kVecs, class RowMax>
__device__ __forceinline__ void find_largest(float (&largest)[kVecs], const RowMax& row_max) {
    if constexpr (kGroups) {
#pragma unroll
        for (int i = 0; i < kVecs; ++i) largest[i] = fmaxf(group_max(largest[i]), kLeastScaled);
    } else {
#pragma unroll
        for (int i = 1; i < kVecs; ++i) largest[0] = fmaxf(largest[0], largest[i]);
        largest[0] = fmaxf(row_max(largest[0]), kLeastScaled);
    }
}

// Vector i of a thread, behind find_largest.
template <int kWidth, int kVecs>
__device__ __forceinline__ void store_quantised(const Vec (&row)[kVecs], int i, i64 index, int column,
                                                const float (&largest)[kVecs], const Quantised& out) {
    if constexpr (kGroups) {
        store_group(row[i], index, column, kWidth, largest[i], out);
    } else {
        store_codes(row[i], largest[0], out.codes + index * kWidth + column);
    }
}

// All threads of a block call it with their vectors of the row, zeros where a vector lies behind the row's end: vector i of
// thread t has the columns from (i * kThreads + t) * kVec on. scratch holds one float per warp and is free before the call.
template <int kThreads, int kWidth, int kVecs>
__device__ __forceinline__ void quantise_row(const Vec (&row)[kVecs], i64 index, const Quantised& out, float* scratch) {
    float largest[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) largest[i] = largest_of(row[i]);
    find_largest(largest, [&](float own) { return block_max<kThreads>(own, scratch); });
    if (!kGroups && threadIdx.x == 0) out.scales[index] = largest[0] / kLargestCode;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
        const int column = (i * kThreads + static_cast<int>(threadIdx.x)) * kVec;
        if (column < kWidth) store_quantised<kWidth>(row, i, index, column, largest, out);
    }
}
