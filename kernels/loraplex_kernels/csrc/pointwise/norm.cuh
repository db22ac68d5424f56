// What an RMS norm multiplies one value with, rounded where transformers rounds it; the product is not rounded yet.
#pragma once
#include "common.cuh"

__device__ __forceinline__ float normed(float value, float scale, float weight) {
#ifdef NORM_OFFSET
    return value * scale * (1.f + weight);  // Gemma: in fp32 to the end
#else
    return weight * rounded(value * scale);
#endif
}
