// What the kernels of FLoRA read: the rows of a step that have it, and A and B of a slice; flora.py fills both.
#pragma once
#include "lora/parts.cuh"

// FLoRA of one (adapter, layer, op). A and B are fp32 whatever the element type.
struct alignas(16) FloraEntry {
    int rank[kSlices];  // 0: the slice has none
    int reserved;
    int a_first[kSlices], a_step[kSlices];     // first tile; columns of every tile but the last
    int b_first[kSlices], b_step[kSlices];     // the same of outputs
    i64 a_offset[kSlices], b_offset[kSlices];  // of the first tile in the pool; -1: ask the tile table
};
static_assert(sizeof(FloraEntry) == 112, "flora.py writes 112 bytes");

struct alignas(16) FloraRow {
    int row;      // of x and y
    int adapter;  // it has FLoRA, but maybe not in this op
    int first;    // of its passes, which follow each other
    int reserved;
};

// One matrix: row r of a tile holds its factors of pass r, [rank][columns of the tile].
struct Factors {
    int rank, first, step, length;
    i64 offset;
};
__device__ __forceinline__ Factors load_factors(const FloraEntry* e, int slice, const int* first, const int* step,
                                                const i64* offset, int length) {
    return {static_cast<int>(load_lasting4(e->rank + slice)), static_cast<int>(load_lasting4(first + slice)),
            static_cast<int>(load_lasting4(step + slice)), length, load_lasting8(offset + slice)};
}

// Where factors from `at` on of pass 0 lie, and how far apart those of one pass and the next are, in bytes.
struct FactorColumn {
    const u8* from;
    int stride;
};
__device__ __forceinline__ FactorColumn factor_column(const PartTables& t, const Factors& f, int at) {
    const int tile = at / f.step, start = tile * f.step,
              stride = min(f.step, f.length - start) * static_cast<int>(sizeof(float));
    const int bytes = (f.rank * f.step * static_cast<int>(sizeof(float)) + kTileAlign - 1) / kTileAlign * kTileAlign;
    const i64 begin = f.offset >= 0 ? f.offset + static_cast<i64>(tile) * bytes : load_lasting8(t.tiles + f.first + tile);
    return {t.pool + begin + (at - start) * static_cast<i64>(sizeof(float)), stride};
}
