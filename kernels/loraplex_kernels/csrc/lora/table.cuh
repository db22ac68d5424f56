// The device table of low-rank pairs and the work items of a step; tables.py and items.py fill them.
#pragma once
#include "common.cuh"

constexpr int kSlices = 3;       // most projections of one op (q, k, v)
constexpr int kGroupTokens = 8;  // tokens of one adapter that share a load of its weights: the N of mma.m16n8k16
// Kernels built with LORAPLEX_CHAINS take rows that add several adapters up, each a term of its row, and larger ranks.
#ifdef LORAPLEX_CHAINS
constexpr int kMaxRank = 512;  // most rank rows of a slice, of which 32 outputs fit a 32 KiB tile
#else
constexpr int kMaxRank = 256;  // most rank rows of a slice; up to as many stacked, 64 columns of them fit a 32 KiB tile
#endif

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
static_assert(sizeof(OpEntry) == 96, "low_rank.py writes 96 bytes");
constexpr int kTileAlign = 128;

// Up to kGroupTokens tokens of one adapter.
struct alignas(16) Group {
    int adapter;  // -1: base model alone
    int count;
    int reserved[2];
    int tokens[kGroupTokens];  // rows of h and of scales
#ifdef LORAPLEX_CHAINS
    int rows[kGroupTokens];  // rows of activations
    __device__ __forceinline__ int row(int t) const { return rows[t]; }
#else
    __device__ __forceinline__ int row(int t) const { return tokens[t]; }
#endif
};
#ifdef LORAPLEX_CHAINS
static_assert(sizeof(Group) == 80, "chains.py writes 80 bytes");
#else
static_assert(sizeof(Group) == 48, "items.py writes 48 bytes");
#endif

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
    const OpEntry* entries;  // [adapters][layers][ops], already advanced to this layer and op
    i64 entry_stride;        // entries from one adapter to the next
    const Group* groups;
    const Item* items;
    const int* range;  // first item and number of items of this launch
};
static_assert(sizeof(LoraTables) == 56, "params.py mirrors it");

// Offset in the pool of tile number `tile` of a matrix; `offset` and `first` are its entry's, tiles but the last have `elems`.
__device__ __forceinline__ i64 tile_offset(const LoraTables& t, i64 offset, int first, int tile, int elems) {
    if (offset < 0) return load_lasting8(t.tiles + first + tile);
    const int bytes = (elems * static_cast<int>(sizeof(elem)) + kTileAlign - 1) / kTileAlign * kTileAlign;
    return offset + static_cast<i64>(tile) * bytes;
}

__device__ __forceinline__ Item load_item(const LoraTables& t, int i) {
    const Quad q = load_lasting16(t.items + i);
    return {static_cast<int>(q.x), static_cast<int>(q.y), static_cast<int>(q.z), static_cast<int>(q.w)};
}
// First item and number of items.
__device__ __forceinline__ Pair load_range(const LoraTables& t) {
    const i64 both = load_lasting8(t.range);
    return {static_cast<u32>(both), static_cast<u32>(both >> 32)};
}
// What the way to A takes of an entry, and the way to a slice's B: read at once. For decode; the prefill kernel, which keeps a
// tile's fields in registers to its end, is 15 % slower so, and reads an OpEntry's fields where it needs them.
struct AEntry {
    int a_first, a_step, stacked_rank;
    i64 a_offset;
};
struct BEntry {
    int rank, first_row;
    int b_first, b_step;
    float scaling;
    i64 b_offset;
};
__device__ __forceinline__ AEntry load_a_entry(const LoraTables& t, int adapter) {
    const OpEntry* e = t.entries + adapter * t.entry_stride;
    const Quad q = load_lasting16(e);
    const i64 offset = load_lasting8(&e->a_offset);
    return {static_cast<int>(q.x), static_cast<int>(q.y), static_cast<int>(q.z), offset};
}
// The entry behind an adapter's is the one that its next op reads, in this layer or the next: a trip to HBM otherwise, at the
// start of an op, when nothing else is under way. Its first threads ask for a part each; behind the last entry tables.py
// leaves a spare one.
__device__ __forceinline__ void prefetch_next_entry(const LoraTables& t, int adapter, int part) {
    constexpr int kPart = 32;
    if (part >= static_cast<int>(sizeof(OpEntry)) / kPart) return;
    prefetch_lasting(reinterpret_cast<const u8*>(t.entries + adapter * t.entry_stride + 1) + part * kPart);
}
// Rank 0 of no adapter.
__device__ __forceinline__ BEntry load_b_entry(const LoraTables& t, int adapter, int slice) {
    if (adapter < 0) return {};
    const OpEntry* e = t.entries + adapter * t.entry_stride;
    const Quad ranks = load_lasting16(e->rank);
    const u32 first = load_lasting4(e->b_first + slice), step = load_lasting4(e->b_step + slice);
    const u32 scaling = load_lasting4(e->scaling + slice);
    const i64 offset = load_lasting8(e->b_offset + slice);
    const u32 rank = slice == 0 ? ranks.x : slice == 1 ? ranks.y : ranks.z;
    const u32 first_row = slice == 0 ? 0 : slice == 1 ? ranks.x : ranks.x + ranks.y;
    return {static_cast<int>(rank), static_cast<int>(first_row), static_cast<int>(first),
            static_cast<int>(step), __uint_as_float(scaling),    offset};
}

template <class Entry>
__device__ __forceinline__ i64 a_tile(const LoraTables& t, const Entry& e, int tile) {
    return tile_offset(t, e.a_offset, e.a_first, tile, e.stacked_rank * e.a_step);
}
__device__ __forceinline__ i64 b_tile(const LoraTables& t, const BEntry& e, int tile) {
    return tile_offset(t, e.b_offset, e.b_first, tile, e.rank * e.b_step);
}
__device__ __forceinline__ i64 b_tile(const LoraTables& t, const OpEntry& e, int slice, int tile) {
    return tile_offset(t, e.b_offset[slice], e.b_first[slice], tile, e.rank[slice] * e.b_step[slice]);
}

// Columns [col, ...) of rank row `row` of a stacked A; the caller stays within one tile.
__device__ __forceinline__ const u8* a_address(const LoraTables& t, const AEntry& e, int row, int col, int columns) {
    const int tile = col / e.a_step;
    const int start = tile * e.a_step;
    const int width = min(e.a_step, columns - start);
    return t.pool + a_tile(t, e, tile) + (static_cast<i64>(row) * width + (col - start)) * sizeof(elem);
}

// Offset in the pool of output row n of a slice's B.
__device__ __forceinline__ i64 b_offset(const LoraTables& t, const BEntry& e, int n) {
    const int tile = n / e.b_step;
    const i64 row = n - tile * e.b_step;
    return b_tile(t, e, tile) + row * e.rank * static_cast<i64>(sizeof(elem));
}

// The chain from an item to its weights (item, entry, sometimes tile) is dependent loads: as long as reading the weights
// themselves. So a CTA walks it for many of its items at once, a thread per piece of weights, and keeps the ends, and the
// groups' tokens, in shared memory.
constexpr int kBatch = 16;  // most items of a batch

template <int kGroupsPerItem>
struct ItemBatch {
    Item items[kBatch];
    Group groups[kBatch][kGroupsPerItem];
};

// This CTA's item number `which`, counted over all batches.
__device__ __forceinline__ int item_index(int which) { return blockIdx.x + which * gridDim.x; }

// How many of this CTA's items there are from number `first` on, at most `room`.
__device__ __forceinline__ int items_left(int num_items, int first, int room) {
    const int grid = gridDim.x;
    return min(room, max(0, (num_items - static_cast<int>(blockIdx.x) + grid - 1) / grid - first));
}

// Starts a part of the way to an item's groups, which lie behind each other: its first threads copy 16 bytes each. Stored
// after all loads are asked for.
constexpr int kGroupQuads = sizeof(Group) / sizeof(Quad);
__device__ __forceinline__ Quad load_group_part(const LoraTables& t, const Item& item, int part, int num_groups) {
    Quad quad = {};
    if (part < kGroupQuads * num_groups) quad = load_lasting16(reinterpret_cast<const Quad*>(t.groups + item.group) + part);
    return quad;
}
__device__ __forceinline__ void keep_group_part(Group* groups, int part, int num_groups, const Quad& quad) {
    if (part < kGroupQuads * num_groups) reinterpret_cast<Quad*>(groups)[part] = quad;
}
