// How c and b of a row's adapter finish an output: y = c * (y - base_bias) + base_bias + scale * b.
#pragma once
#include "lora/parts.cuh"

// c or b of a row in one slice; step 0: there is none.
struct SliceVector {
    int first, step, flags;
    i64 offset;
};
__device__ __forceinline__ SliceVector load_slice(const VectorEntry* e, int slice) {
    const Quad firsts = load_lasting16(e->first), steps = load_lasting16(e->step);
    const i64 offset = load_lasting8(e->offset + slice);
    const u32 first = slice == 0 ? firsts.x : slice == 1 ? firsts.y : firsts.z;
    const u32 step = slice == 0 ? steps.x : slice == 1 ? steps.y : steps.z;
    return {static_cast<int>(first), static_cast<int>(step), static_cast<int>(firsts.w), offset};
}

// c and b of kVec outputs, `at` the first in its slice.
struct Finish {
    Numbers factors, added;
};
__device__ __forceinline__ Finish load_finish(const PartTables& tables, const SliceVector& c, const SliceVector& b, int at) {
    Finish finish = {};
    if (c.step != 0) finish.factors = load_numbers(tables, c.first, c.step, c.offset, at);
    if (b.step != 0) finish.added = load_numbers(tables, b.first, b.step, b.offset, at);
    return finish;
}

// kVec outputs, y without them; `base_bias` (null: none) is what the base adds to these.
__device__ __forceinline__ Vec finished(Vec y, const Finish& finish, const SliceVector& c, const elem* base_bias, float scale) {
    Vec bias = {};
    if (c.step != 0 && base_bias != nullptr && !(c.flags & kScalesBias)) bias = load_vec(base_bias);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
        float v = to_float(y.v[j]);
        const float kept = to_float(bias.v[j]);
        if (c.step != 0) v = finish.factors.v[j] * (v - kept) + kept;
        y.v[j] = from_float<elem>(v + scale * finish.added.v[j]);
    }
    return y;
}
