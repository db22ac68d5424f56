// What lora/expand.cu computes, and a CTA's way to it: parameters, a batch of resolved items, a lane's outputs.
#pragma once
#include "lora/table.cuh"

constexpr int kExpandWarps = 4;
constexpr int kExpandThreads = kExpandWarps * kWarp;
constexpr int kBlockRows = 64;  // outputs of a warp's block
constexpr int kLaneRows = 8;    // neighbouring outputs that a lane ends with
constexpr int kLoads = 4;       // 16-byte vectors of B of a lane and pass

struct ExpandParams {
    const float* h;      // [planes][tokens][h_stride]
    const float* scale;  // [tokens] the requests' own factors
    i64 h_plane;
    int h_stride;
    int num_planes;
    int slice_begin[kSlices + 1];  // first fused output of each slice; unused slices are empty
};
static_assert(sizeof(ExpandParams) == 48, "params.py mirrors it");

// Outputs 8 g .. 8 g + 7 of a block for tokens 2 c and 2 c + 1 of the group.
struct Delta {
    float v[2][kLaneRows];
};

__device__ __forceinline__ int slice_of(const ExpandParams& p, int n) {
    int slice = 0;
#pragma unroll
    for (int s = 1; s < kSlices; ++s) slice += n >= p.slice_begin[s];
    return slice;
}

// How B's rows lie; chosen by rank once per item, so that each way keeps only its own registers.
enum class Rows {
    kNone,       // the adapter leaves this projection alone
    kOne,        // four lanes read 64 bytes of one row
    kTwo,        // ... the two rows of rank 16
    kFour,       // ... the four rows of rank 8
    kUnaligned,  // any rank, 2 bytes at a time
};
__device__ __forceinline__ Rows rows_of(int rank) {
    return rank == 0       ? Rows::kNone
           : rank % 8 != 0 ? Rows::kUnaligned
           : rank == 8     ? Rows::kFour
           : rank == 16    ? Rows::kTwo
                           : Rows::kOne;
}
// Calls f.run<rows>(): what follows is compiled for each way.
template <class F>
__device__ __forceinline__ void with_rows(Rows rows, F f) {
#ifdef LORAPLEX_FP32
    if (rows == Rows::kNone) {
        f.template run<Rows::kNone>();
    } else {
        f.template run<Rows::kOne>();
    }
#else
    if (rows == Rows::kTwo) {
        f.template run<Rows::kTwo>();
    } else if (rows == Rows::kOne) {
        f.template run<Rows::kOne>();
    } else if (rows == Rows::kFour) {
        f.template run<Rows::kFour>();
    } else if (rows == Rows::kUnaligned) {
        f.template run<Rows::kUnaligned>();
    } else {
        f.template run<Rows::kNone>();
    }
#endif
}

constexpr int kItemBlocks = 8;                           // most blocks of an item
constexpr int kWarpBlocks = kItemBlocks / kExpandWarps;  // ... of a warp: w and w + 4
static_assert(kBatch * kItemBlocks == kExpandThreads, "a thread walks to each");

// What an item's slice looks like: rank 0 where the adapter leaves it alone, or there is none.
struct SliceInfo {
    int rank;
    int first_row;  // of the stacked h
    float scaling;
    int index;
};

// Where B's rows of a block are.
struct alignas(16) Block {
    i64 offset;       // in the pool, of the first row; fp32, whose tiles may be narrower than a block: the row's number
    int vector_rank;  // the rank where rows are read as whole 16-byte vectors, 0 where they are not, or there are none
    int rows;         // live outputs, a multiple of 8
#ifdef LORAPLEX_CHAINS
    i64 upper;  // the same as offset for rows 32 on, which ranks above 256 have in another tile: less the bytes of 32 rows
    __device__ __forceinline__ i64 base(int g) const { return g < 4 ? offset : upper; }
#else
    __device__ __forceinline__ i64 base(int) const { return offset; }
#endif
};

struct ExpandBatch {
    ItemBatch<1> batch;
    SliceInfo slices[kBatch];
    Block blocks[kExpandThreads];  // of each item, live or not
};

__device__ __forceinline__ Block find_block(const LoraTables& t, const BEntry& e, int n, int rows) {
    Block block = {};
    block.rows = max(0, min(kBlockRows, rows));
    if (e.rank == 0 || block.rows == 0) return block;
#ifdef LORAPLEX_FP32
    block.offset = n;
#else
    block.offset = b_offset(t, e, n);
    if (e.rank % 8 == 0) block.vector_rank = e.rank;
#ifdef LORAPLEX_CHAINS
    constexpr int kHalfBlock = kBlockRows / 2;
    block.upper = block.offset;
    if (e.b_step < kBlockRows && block.rows > kHalfBlock) {
        block.upper = b_offset(t, e, n + kHalfBlock) - kHalfBlock * e.rank * static_cast<i64>(sizeof(elem));
    }
#endif
#endif
    return block;
}

// A CTA's items, counted over all batches.
struct ItemWalk {
    int first_item, num_items;

    __device__ __forceinline__ bool has(int first, int which) const { return item_index(first + which) < num_items; }
    __device__ __forceinline__ Item load(const LoraTables& t, int first, int which) const {
        return load_item(t, first_item + item_index(first + which));
    }
    __device__ __forceinline__ int left(int first) const { return items_left(num_items, first, kBatch); }
};

// Walks to the weights of a batch of items, `first` on; returns how many there are.
template <class Walk>
__device__ __forceinline__ int resolve(const LoraTables& t, const ExpandParams& p, const Walk& walk, int first,
                                       ExpandBatch& shared) {
    const int which = threadIdx.x / kItemBlocks, block = threadIdx.x % kItemBlocks;
    if (walk.has(first, which)) {
        const Item item = walk.load(t, first, which);
        const int slice = slice_of(p, item.begin), begin = block * kBlockRows;
        const Quad group = load_group_part(t, item, block, 1);
        const BEntry e = load_b_entry(t, item.adapter, slice);
        if (block == 0) {
            shared.batch.items[which] = item;
            shared.slices[which] = {e.rank, e.first_row, e.scaling, slice};
        }
        shared.blocks[threadIdx.x] = find_block(t, e, item.begin - p.slice_begin[slice] + begin, item.extent - begin);
        keep_group_part(shared.batch.groups[which], block, 1, group);
    }
    __syncthreads();
    return walk.left(first);
}

// The row of this lane's token `which` (0 or 1) of a group, or -1.
__device__ __forceinline__ int lane_token(const Group& group, int which) {
    const int t = threadIdx.x % 4 * 2 + which;
    return t < group.count ? group.row(t) : -1;
}
// This lane's first output of a block.
__device__ __forceinline__ int lane_row() { return threadIdx.x % kWarp / 4 * kLaneRows; }

// Eight neighbouring elements as they lie in memory: taken apart, bf16 would need a register each.
struct Octet {
    Quad quads[kLaneRows / kVec];
};
__device__ __forceinline__ Octet load_octet(const elem* from) {
    Octet o;
#pragma unroll
    for (int i = 0; i < kLaneRows / kVec; ++i) o.quads[i] = reinterpret_cast<const Quad*>(from)[i];
    return o;
}
__device__ __forceinline__ void store_octet(elem* to, const Octet& o) {
#pragma unroll
    for (int i = 0; i < kLaneRows / kVec; ++i) reinterpret_cast<Quad*>(to)[i] = o.quads[i];
}
// The elements of a word plus as many floats.
__device__ __forceinline__ u32 sum_word(u32 word, const float* delta) {
#ifdef LORAPLEX_FP32
    return __float_as_uint(__uint_as_float(word) + delta[0]);
#else
    return pack_bf16(low_float(word) + delta[0], high_float(word) + delta[1]);
#endif
}
// What was there plus a token's delta.
__device__ __forceinline__ Octet sum_octet(const Octet& before, const Delta& delta, int which) {
    constexpr int kWord = kVec / 4;
    Octet o;
#pragma unroll
    for (int i = 0; i < kLaneRows / kVec; ++i) {
        const Quad& q = before.quads[i];
        const float* v = delta.v[which] + i * kVec;
        o.quads[i] = {sum_word(q.x, v), sum_word(q.y, v + kWord), sum_word(q.z, v + 2 * kWord), sum_word(q.w, v + 3 * kWord)};
    }
    return o;
}
