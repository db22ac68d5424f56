// Floats as unsigned integers of the same order; both zeros are equal.
#pragma once
#include "common.cuh"

__device__ __forceinline__ u32 rising(float x) {
    const u32 bits = __float_as_uint(x == 0.f ? 0.f : x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_rising(u32 order) {
    return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}
