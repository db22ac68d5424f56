// The device tables of resident adapters and the work items of a step; tables.py and items.py fill them.
#pragma once
#include "common.cuh"

constexpr int kSlices = 3;        // most projections of one op (q, k, v)
constexpr int kGroupTokens = 8;   // tokens of one adapter that share a load of its weights: the N of mma.m16n8k16
constexpr int kMaxRank = 256;     // most rank rows of a slice; up to as many stacked, 64 columns of them fit a 32 KiB tile

// One (adapter, layer, op). Ranks of 0: not adapted. Tiles are numbered in the tile table, which is one load too many on
// the way to a matrix that no page's end divides: its tiles lie behind each other from an offset of the pool on.
struct alignas(16) OpEntry {
    int a_first;       // first A tile
    int a_step;        // columns of every A tile but the last
    int stacked_rank;  // rows of an A tile
    int reserved;
    int rank[kSlices];
    int b_first[kSlices];
    int b_step[kSlices];  // outputs of every B tile but the last
    float scaling[kSlices];
    i64 a_offset;  // of the first A tile; -1: ask the tile table
    i64 b_offset[kSlices];
};
static_assert(sizeof(OpEntry) == 96, "tables.py writes 96 bytes");
constexpr int kTileAlign = 128;

// Up to kGroupTokens tokens of one adapter.
struct alignas(16) Group {
    int adapter;  // -1: base model alone
    int count;
    int reserved[2];
    int tokens[kGroupTokens];
};
static_assert(sizeof(Group) == 48, "items.py writes 48 bytes");

// One CTA's share of a group; what begin and extent count is each kernel's.
struct alignas(16) Item {
    int group;
    int adapter;
    int begin;
    int extent;
};

struct LoraTables {
    const u8* pool;          // the unified page pool
    const i64* tiles;        // byte offset of each tile in the pool
    const OpEntry* entries;  // [adapters][layers][4], already advanced to this layer and op
    i64 entry_stride;        // entries from one adapter to the next
    const Group* groups;
    const Item* items;
    const int* range;        // first item and number of items of this launch
};
static_assert(sizeof(LoraTables) == 56, "params.py mirrors it");

// Offset in the pool of tile number `tile` of a matrix; `offset` and `first` are its entry's, tiles but the last have `elems`.
__device__ __forceinline__ i64 tile_offset(const LoraTables& t, i64 offset, int first, int tile, int elems) {
    if (offset < 0) return t.tiles[first + tile];
    const int bytes = (elems * static_cast<int>(sizeof(elem)) + kTileAlign - 1) / kTileAlign * kTileAlign;
    return offset + static_cast<i64>(tile) * bytes;
}
__device__ __forceinline__ i64 a_tile(const LoraTables& t, const OpEntry& e, int tile) {
    return tile_offset(t, e.a_offset, e.a_first, tile, e.stacked_rank * e.a_step);
}
__device__ __forceinline__ i64 b_tile(const LoraTables& t, const OpEntry& e, int slice, int tile) {
    return tile_offset(t, e.b_offset[slice], e.b_first[slice], tile, e.rank[slice] * e.b_step[slice]);
}

// Columns [col, ...) of rank row `row` of a stacked A; the caller stays within one tile.
__device__ __forceinline__ const u8* a_address(const LoraTables& t, const OpEntry& e, int row, int col, int columns) {
    const int tile = col / e.a_step;
    const int start = tile * e.a_step;
    const int width = min(e.a_step, columns - start);
    return t.pool + a_tile(t, e, tile) + (static_cast<i64>(row) * width + (col - start)) * sizeof(elem);
}

// Output row n of a slice's B.
__device__ __forceinline__ const u8* b_address(const LoraTables& t, const OpEntry& e, int slice, int n) {
    const int tile = n / e.b_step[slice];
    const i64 row = n - tile * e.b_step[slice];
    return t.pool + b_tile(t, e, slice, tile) + row * e.rank[slice] * static_cast<i64>(sizeof(elem));
}

// An item and the table entry it names.
struct Work {
    Item item;
    const OpEntry* entry;  // null: adapter -1
};
__device__ __forceinline__ Work fetch_work(const LoraTables& t, int i) {
    const Item item = t.items[t.range[0] + i];
    return {item, item.adapter < 0 ? nullptr : &t.entries[item.adapter * t.entry_stride]};
}

// The chain from an item to its weights (item, entry, sometimes tile) is dependent loads: as long as reading the weights
// themselves. So a CTA walks it for many of its items at once, a thread per piece of weights, and keeps the ends, and the
// groups' tokens, in shared memory.
constexpr int kBatch = 16;  // most items of a batch

struct ItemBatch {
    Item items[kBatch];
    Group groups[kBatch];
};

// This CTA's item number `which`, counted over all batches.
__device__ __forceinline__ int item_index(int which) { return blockIdx.x + which * gridDim.x; }

// How many of this CTA's items there are from number `first` on, at most `room`.
__device__ __forceinline__ int items_left(int num_items, int first, int room) {
    const int grid = gridDim.x;
    return min(room, max(0, (num_items - static_cast<int>(blockIdx.x) + grid - 1) / grid - first));
}

// Starts a part of the way to an item's group: its first threads copy 16 bytes each. Stored after all loads are asked for.
constexpr int kGroupQuads = sizeof(Group) / sizeof(Quad);
__device__ __forceinline__ Quad load_group_part(const LoraTables& t, const Item& item, int part) {
    Quad quad = {};
    if (part < kGroupQuads) quad = reinterpret_cast<const Quad*>(t.groups + item.group)[part];
    return quad;
}
__device__ __forceinline__ void keep_group_part(ItemBatch& batch, int which, int part, const Quad& quad) {
    if (part < kGroupQuads) reinterpret_cast<Quad*>(batch.groups + which)[part] = quad;
}
