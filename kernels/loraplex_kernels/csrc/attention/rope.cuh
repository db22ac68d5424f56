// A head of q, k or v as the threads of rope_kv.cu hold it: which dims a thread has, their norm and their rotation.
//
// Dims of the thread that has `dim` = 8 * its number in the head (a multiple of 8 below HEAD_DIM / 2), 8 from each of two places:
//
//   pairs of neighbours, and dims behind the rotated ones:  [2 dim, 2 dim + 16)
//   pairs of halves, dim < ROTARY_DIM / 2:                  [dim, dim + 8), [ROTARY_DIM / 2 + dim, ROTARY_DIM / 2 + dim + 8)
//   nothing is rotated in any head:                         [dim, dim + 8), [HEAD_DIM / 2 + dim, HEAD_DIM / 2 + dim + 8)
//
// Where dims are rotated, the thread's pairs have the cosines [dim, dim + 8) of a position.
#pragma once
#include "attention/paged_kv.cuh"
#include "pointwise/norm.cuh"

#ifndef ROTARY_DIM
#define ROTARY_DIM HEAD_DIM
#endif
constexpr int kRotary = ROTARY_DIM;
constexpr int kHalf = kHeadDim / 2;
#ifdef INTERLEAVED
constexpr bool kIsInterleaved = true;
#else
constexpr bool kIsInterleaved = false;
#endif
constexpr bool kIsPartial = kRotary != kHeadDim && kRotary != 0;
static_assert(kRotary % 16 == 0 && kRotary <= kHeadDim, "a thread's runs hold pairs of one kind");

__device__ constexpr int power_above(int n) { return n <= 1 ? 1 : 2 * power_above((n + 1) / 2); }
constexpr int kHeadLanes = power_above(kHalf / kRun);
constexpr int kBlockHeads = 256 / kHeadLanes;
static_assert(kHeadLanes <= kWarp, "a head's threads are a part of a warp");

__device__ __forceinline__ bool is_rotated(int dim) { return !kIsPartial || dim < kRotary / 2; }
__device__ __forceinline__ int first_dim(int dim) {
    if constexpr (kIsInterleaved) return 2 * dim;
    return is_rotated(dim) ? dim : 2 * dim;
}
__device__ __forceinline__ int run_distance(int dim) {
    if constexpr (kIsInterleaved) return kRun;
    if constexpr (!kIsPartial) return kHalf;
    return is_rotated(dim) ? kRotary / 2 : kRun;
}

__device__ __forceinline__ Run load_run(const elem* from) {
    Run run;
#pragma unroll
    for (int i = 0; i < kRun / kVec; ++i) {
        const Vec vec = load_vec(from + i * kVec);
#pragma unroll
        for (int j = 0; j < kVec; ++j) run.v[i * kVec + j] = to_float(vec.v[j]);
    }
    return run;
}
__device__ __forceinline__ Run load_floats(const float* from) {
    alignas(16) Run run;
    reinterpret_cast<Quad*>(run.v)[0] = reinterpret_cast<const Quad*>(from)[0];
    reinterpret_cast<Quad*>(run.v)[1] = reinterpret_cast<const Quad*>(from)[1];
    return run;
}

__device__ __forceinline__ void add_delta(const float* delta, Run& run) {
    const Run more = load_floats(delta);
#pragma unroll
    for (int j = 0; j < kRun; ++j) run.v[j] = rounded(run.v[j] + more.v[j]);
}

__device__ __forceinline__ void scale_run(float scale, Run& run) {
#pragma unroll
    for (int j = 0; j < kRun; ++j) run.v[j] = rounded(run.v[j]) * scale;
}

__device__ __forceinline__ float squares_of(const Run& low, const Run& high) {
    float squares = 0.f;
#pragma unroll
    for (int j = 0; j < kRun; ++j) squares += low.v[j] * low.v[j] + high.v[j] * high.v[j];
    return squares;
}

__device__ __forceinline__ void norm_run(const elem* weight, float scale, Run& run) {
    const Run weights = load_run(weight);
#pragma unroll
    for (int j = 0; j < kRun; ++j) run.v[j] = rounded(normed(run.v[j], scale, weights.v[j]));
}

// Multiplies a head by its norm's weight over its root mean square. Only threads that have dims of it count.
__device__ __forceinline__ void norm_head(const elem* weight, int distance, bool counts, float eps, Run& low, Run& high) {
    float squares = counts ? squares_of(low, high) : 0.f;
#pragma unroll
    for (int mask = 1; mask < kHeadLanes; mask <<= 1) squares += __shfl_xor_sync(kFullMask, squares, mask);
    const float scale = rsqrtf(squares / kHeadDim + eps);
    const Run low_weight = load_run(weight), high_weight = load_run(weight + distance);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
        low.v[j] = rounded(normed(low.v[j], scale, low_weight.v[j]));
        high.v[j] = rounded(normed(high.v[j], scale, high_weight.v[j]));
    }
}

__device__ __forceinline__ void rotate_pair(float cosine, float sine, float& a, float& b) {
    const float first = a, second = b;
    a = first * cosine - second * sine;
    b = second * cosine + first * sine;
}
__device__ __forceinline__ void rotate_head(const float* rotary, Run& low, Run& high) {
    const Run cosine = load_floats(rotary), sine = load_floats(rotary + kRotary / 2);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
        if constexpr (kIsInterleaved) {
            Run& run = j < kRun / 2 ? low : high;
            rotate_pair(cosine.v[j], sine.v[j], run.v[2 * j % kRun], run.v[2 * j % kRun + 1]);
        } else {
            rotate_pair(cosine.v[j], sine.v[j], low.v[j], high.v[j]);
        }
    }
}
