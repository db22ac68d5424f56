// SiLU times up, one value.
#pragma once
#include "common.cuh"

__device__ __forceinline__ float silu_mul_value(float gate, float up) { return rounded(gate / (1.f + __expf(-gate))) * up; }
