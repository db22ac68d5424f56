// What the kernels of silu_mul.cu's result in e4m3 share. Sources: silu_mul.cu, fp8.cuh.
#pragma once
#include "pointwise/fp8.cuh"
#include "pointwise/silu.cuh"

constexpr int kWidth = WIDTH;
static_assert(kWidth % kVec == 0, "rows are read as 16-byte vectors");

struct Params {
    const elem* gate_up;  // [rows, 2 * WIDTH]
    elem* out;            // [rows, WIDTH], or null: the e4m3 form is all that is written
    const float* delta;   // same shape as gate_up, or null
    Quantised quantised;
};
static_assert(sizeof(Params) == 48, "fp8_params.py mirrors it");

__device__ __forceinline__ float with_delta(const elem& value, const float* delta) {
    return delta == nullptr ? to_float(value) : rounded(to_float(value) + *delta);
}

// The vector of a row's result that begins at a column.
__device__ __forceinline__ Vec activate(const Params& p, i64 row, int column) {
    const i64 at = row * 2 * kWidth + column;
    const Vec gates = load_vec(p.gate_up + at), ups = load_vec(p.gate_up + at + kWidth);
    const float* delta = p.delta == nullptr ? nullptr : p.delta + at;
    Vec values;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
        const float gate = with_delta(gates.v[j], delta ? delta + j : nullptr);
        const float up = with_delta(ups.v[j], delta ? delta + kWidth + j : nullptr);
        values.v[j] = from_float<elem>(gated(gate, up));
    }
    return values;
}
