// SiLU times up, one value.
#pragma once
#include "common.cuh"

__device__ __forceinline__ float silu_mul_value(float gate, float up) { return rounded(gate / (1.f + __expf(-gate))) * up; }

// Or GELU in its approximation by tanh, in the place of SiLU.
__device__ __forceinline__ float gated(float gate, float up) {
#ifdef GELU_TANH
    const float inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);  // sqrt(2 / pi)
    return rounded(0.5f * gate * (1.f + tanhf(inner))) * up;
#else
    return silu_mul_value(gate, up);
#endif
}
