// out = cap * tanh(logits / cap), each step rounded to the element type, as torch does. A logit of -inf behind the vocabulary is
// that of no token and stays what it is.
//
// Grid: (ceil(width / (256 * 16 bytes)), rows). Block: 256 threads, 16 bytes each; the last of a row, and rows that do not
// begin on 16 bytes, go by elements. No shared memory. Registers: 8 CTAs per SM, hence at most 32.
// Architectures: sm_80 and up. Source: Gemma Team, "Gemma 2", arXiv:2408.00118, section 2.
#include "common.cuh"

struct Params {
    const elem* logits;  // [rows, stride]
    elem* out;           // likewise
    i64 stride;
    int width;  // columns that are computed
    int vocab;
    float cap;
    int reserved;
};
static_assert(sizeof(Params) == 40, "params.py mirrors it");

__device__ __forceinline__ elem capped(const Params& p, elem logit, int column) {
    const float x = to_float(logit);
    if (column >= p.vocab && x == negative_infinity()) return logit;
    return from_float<elem>(rounded(tanhf(rounded(x / p.cap))) * p.cap);
}

extern "C" __global__ void __launch_bounds__(256, 8) softcap(const Params p) {
    allow_dependents();
    dependency_wait();
    const int column = (blockIdx.x * 256 + threadIdx.x) * kVec;
    const i64 row = blockIdx.y * p.stride;
    if (column + kVec <= p.width && p.stride % kVec == 0) {
        Vec vec = load_vec(p.logits + row + column);
#pragma unroll
        for (int j = 0; j < kVec; ++j) vec.v[j] = capped(p, vec.v[j], column + j);
        store_vec(p.out + row + column, vec);
        return;
    }
    for (int i = column; i < min(column + kVec, p.width); ++i) p.out[row + i] = capped(p, p.logits[row + i], i);
}
