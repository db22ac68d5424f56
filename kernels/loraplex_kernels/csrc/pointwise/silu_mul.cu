// out = silu(gate) * up over rows [gate | up], LoRA's delta added first if there is one; silu rounded to the element type, as
// torch does. With GELU_TANH it is GELU in its approximation by tanh, in the place of SiLU (Hendrycks and Gimpel, arXiv:1606.08415).
//
// Grid: (ceil(WIDTH / (256 * 16 bytes)), rows). Block: 256 threads, one 16-byte vector each. No shared memory.
// Alignment: WIDTH % (16 / sizeof(elem)) == 0. Registers: 8 CTAs per SM, hence at most 32. Architectures: sm_80 and up.
#include "pointwise/silu.cuh"

constexpr int kWidth = WIDTH;
static_assert(kWidth % kVec == 0, "rows are read as 16-byte vectors");

struct Params {
    const elem* gate_up;  // [rows, 2 * WIDTH]
    elem* out;            // [rows, WIDTH]
    const float* delta;   // same shape as gate_up, or null
};
static_assert(sizeof(Params) == 24, "params.py mirrors it");

__device__ __forceinline__ void add_delta(const float* delta, float (&v)[kVec]) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[j] = rounded(v[j] + delta[j]);
}

extern "C" __global__ void __launch_bounds__(256, 8) silu_mul(const Params p) {
    allow_dependents();
    dependency_wait();
    const int column = (blockIdx.x * 256 + threadIdx.x) * kVec;
    if (column >= kWidth) return;
    const i64 row = blockIdx.y;
    const Vec gates = load_vec(p.gate_up + row * 2 * kWidth + column);
    const Vec ups = load_vec(p.gate_up + row * 2 * kWidth + kWidth + column);
    float gate[kVec], up[kVec];
#pragma unroll
    for (int j = 0; j < kVec; ++j) gate[j] = to_float(gates.v[j]), up[j] = to_float(ups.v[j]);
    if (p.delta != nullptr) {
        add_delta(p.delta + row * 2 * kWidth + column, gate);
        add_delta(p.delta + row * 2 * kWidth + kWidth + column, up);
    }
    Vec out;
#pragma unroll
    for (int j = 0; j < kVec; ++j) out.v[j] = from_float<elem>(gated(gate[j], up[j]));
    store_vec(p.out + row * kWidth + column, out);
}
