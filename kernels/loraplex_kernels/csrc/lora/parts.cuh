// The device tables of vectors (c, e, b) and sparse deltas of adapters; vectors.py and sparse_delta.py fill them.
#pragma once
#include "lora/table.cuh"

// c or b of one (adapter, layer, op). Vectors are fp32 whatever the element type.
struct alignas(16) VectorEntry {
    int first[kSlices];  // first tile
    int flags;
    int step[kSlices];  // outputs of every tile but the last; 0: the slice has no such vector
    int reserved;
    i64 offset[kSlices];  // of the first tile in the pool; -1: ask the tile table
    i64 padding;
};
static_assert(sizeof(VectorEntry) == 64, "vectors.py writes 64 bytes");
constexpr int kScalesBias = 2;  // vectors.SCALES_BIAS

// e of one (adapter, layer, op): all slices share it.
struct alignas(16) InVectorEntry {
    int first, step;
    i64 offset;
};
static_assert(sizeof(InVectorEntry) == 16, "vectors.py writes 16 bytes");

// S of one (adapter, layer, op), by output row: values, their columns, and where each output's begin.
struct alignas(16) SparseEntry {
    int value_first[kSlices], value_step[kSlices];
    int column_first[kSlices], column_step[kSlices];
    int start_first[kSlices], start_step[kSlices];
    int count[kSlices];  // non-zeros; 0: the slice has no delta
    float scaling[kSlices];
    i64 value_offset[kSlices], column_offset[kSlices], start_offset[kSlices];
    i64 padding[3];
};
static_assert(sizeof(SparseEntry) == 192, "sparse_delta.py writes 192 bytes");

// What a kernel reads of the rows of a step and of the pool.
struct PartTables {
    const u8* pool;       // the unified page pool
    const i64* tiles;     // byte offset of each tile in the pool
    const int* adapters;  // [rows]; -1: base model alone
    i64 entry_stride;     // entries from one adapter to the next
};
static_assert(sizeof(PartTables) == 32, "params.py mirrors it");

// kVec numbers of a vector.
struct Numbers {
    float v[kVec];
};

__device__ __forceinline__ Numbers read_numbers(const u8* from) {
    Numbers n;
#pragma unroll
    for (int q = 0; q < kVec / 4; ++q) {
        const Quad quad = load_weights16(from + q * 16);
        n.v[q * 4] = __uint_as_float(quad.x), n.v[q * 4 + 1] = __uint_as_float(quad.y);
        n.v[q * 4 + 2] = __uint_as_float(quad.z), n.v[q * 4 + 3] = __uint_as_float(quad.w);
    }
    return n;
}

// The kVec numbers from `at` on; `step` is not 0, and no tile ends between them.
__device__ __forceinline__ Numbers load_numbers(const PartTables& t, int first, int step, i64 offset, int at) {
    const i64 from = offset >= 0 ? offset + at * static_cast<i64>(sizeof(float))
                                 : load_lasting8(t.tiles + first + at / step) + at % step * static_cast<i64>(sizeof(float));
    return read_numbers(t.pool + from);
}
