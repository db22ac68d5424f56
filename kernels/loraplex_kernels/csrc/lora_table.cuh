// The device tables of resident adapters and the work items of a step; tables.py and items.py fill them.
#pragma once
#include "common.cuh"

constexpr int kSlices = 3;        // most projections of one op (q, k, v)
constexpr int kGroupTokens = 8;   // tokens of one adapter that share a load of its weights: the N of mma.m16n8k16
constexpr int kMaxRank = 256;     // most stacked rank rows of an op: 64 columns of them fill a 32 KiB tile

// One (adapter, layer, op). Ranks of 0: not adapted. Tiles are numbered in the tile table.
struct alignas(16) OpEntry {
    int a_first;       // first A tile
    int a_step;        // columns of every A tile but the last
    int stacked_rank;  // rows of an A tile
    int reserved;
    int rank[kSlices];
    int b_first[kSlices];
    int b_step[kSlices];  // outputs of every B tile but the last
    float scaling[kSlices];
};
static_assert(sizeof(OpEntry) == 64, "tables.py writes 64 bytes");

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

// Columns [col, ...) of rank row `row` of a stacked A; the caller stays within one tile.
__device__ __forceinline__ const u8* a_address(const LoraTables& t, const OpEntry& e, int row, int col, int columns) {
    const int tile = col / e.a_step;
    const int start = tile * e.a_step;
    const int width = min(e.a_step, columns - start);
    return t.pool + t.tiles[e.a_first + tile] + (static_cast<i64>(row) * width + (col - start)) * sizeof(elem);
}

// Output row n of a slice's B.
__device__ __forceinline__ const u8* b_address(const LoraTables& t, const OpEntry& e, int slice, int n) {
    const int tile = n / e.b_step[slice];
    const i64 row = n - tile * e.b_step[slice];
    return t.pool + t.tiles[e.b_first[slice] + tile] + row * e.rank[slice] * static_cast<i64>(sizeof(elem));
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

// The chain from an item to its weights (item, entry, tile, and the group's tokens) is four dependent loads: as long as
// reading the weights themselves. So a CTA walks it for many of its items at once, a thread per piece of weights, and
// keeps the ends in shared memory.
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

// Copies the groups of the first `count` items. Between barriers: the items were written before, groups are read after.
template <int kThreads>
__device__ __forceinline__ void fetch_groups(const LoraTables& t, ItemBatch& batch, int count) {
    constexpr int kQuads = sizeof(Group) / sizeof(Quad);
#pragma unroll 1
    for (int i = threadIdx.x; i < count * kQuads; i += kThreads) {
        const int which = i / kQuads;
        reinterpret_cast<Quad*>(batch.groups + which)[i % kQuads] =
            reinterpret_cast<const Quad*>(t.groups + batch.items[which].group)[i % kQuads];
    }
}
