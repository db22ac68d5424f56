// The device table of rows of the embedding or of lm_head that adapters replace; token_rows.py fills it.
#pragma once
#include "lora/table.cuh"

// Rows of one (adapter, op): their tokens, rising, and their values.
struct alignas(16) RowsEntry {
    int count;                    // rows; 0: none
    int id_first, id_step;        // first tile of the tokens, tokens of every tile but the last
    int value_first, value_step;  // the same of the values, rows
    int last_id;
    i64 id_offset, value_offset;  // of the first tile in the pool; -1: ask the tile table
    i64 padding;
};
static_assert(sizeof(RowsEntry) == 48, "token_rows.py writes 48 bytes");

// Rows of an adapter that a kernel has read.
struct Rows {
    int count, id_first, id_step, value_first, value_step, last_id;
    i64 id_offset, value_offset;
};
__device__ __forceinline__ Rows load_rows_entry(const RowsEntry* e) {
    const Quad head = load_lasting16(e);
    const i64 tail = load_lasting8(&e->value_step);
    return {static_cast<int>(head.x),     static_cast<int>(head.y),       static_cast<int>(head.z),
            static_cast<int>(head.w),     static_cast<int>(tail),         static_cast<int>(tail >> 32),
            load_lasting8(&e->id_offset), load_lasting8(&e->value_offset)};
}

// Where piece number `at` of a matrix lies, of `bytes` each, `step` to a tile.
__device__ __forceinline__ const u8* piece_address(const LoraTables& t, int first, int step, i64 offset, int at, int bytes) {
    const int tile = at / step;
    const i64 tile_bytes = (static_cast<i64>(step) * bytes + kTileAlign - 1) / kTileAlign * kTileAlign;
    const i64 begin = offset >= 0 ? offset + tile * tile_bytes : load_lasting8(t.tiles + first + tile);
    return t.pool + begin + static_cast<i64>(at - tile * step) * bytes;
}
__device__ __forceinline__ int token_at(const LoraTables& t, const Rows& rows, int at) {
    return static_cast<int>(load_lasting4(piece_address(t, rows.id_first, rows.id_step, rows.id_offset, at, sizeof(int))));
}
__device__ __forceinline__ const u8* values_at(const LoraTables& t, const Rows& rows, int at, int columns) {
    const int bytes = columns * static_cast<int>(sizeof(elem));
    return piece_address(t, rows.value_first, rows.value_step, rows.value_offset, at, bytes);
}
