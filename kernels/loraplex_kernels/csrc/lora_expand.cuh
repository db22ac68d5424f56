// delta[t][n] = scaling * scale[t] * (sum over planes of h[plane][t]) * B^T for blocks of 64 outputs of one slice, left in
// registers as fp32: the second half of LoRA at decode.
//
// Work item: (group of <= 8 tokens, run of outputs): begin = first output in the op's fused outputs, extent = how many;
// a run stays within a slice and starts on a multiple of 64. Block: 4 warps, each with blocks of its own; only h is
// shared, staged once per item.
//
// bf16: mma.m16n8k16 with outputs as M, rank as K, tokens as N. B's rows are 2 r bytes and contiguous, so a lane's 16
// bytes are 8 values of k of one row; which rows and which k is chosen so that (1) four lanes read 64 bytes in a row and
// (2) lane (g, c) ends with outputs 8 g .. 8 g + 7 of tokens 2 c and 2 c + 1: one 16-byte vector of y per token.
//   rank >= 24: lanes c = 0..3 read four vectors of one row, 32 values of k.
//   rank 16:    lanes c = 0, 1 read an even row, c = 2, 3 the odd one after it; h is masked to the lanes whose row it is.
//   rank 8:     lanes c = 0..3 read four rows, likewise.
// All loads of B are issued before the kernel waits for h: two blocks of 2 KiB in flight per warp. h is split into two bf16 (high + low), so the product keeps the fp32 precision of h at the price of idle tensor cores.
// fp32: scalar FMAs, the same outputs per lane.
// Longer than a file should be: four ways for a lane's bytes to lie, each of whose loads and products belong side by side.
#pragma once
#include "lora_table.cuh"

constexpr int kExpandWarps = 4;
constexpr int kExpandThreads = kExpandWarps * kWarp;
constexpr int kBlockRows = 64;  // outputs of a warp's block
constexpr int kLaneRows = 8;    // neighbouring outputs that a lane ends with
constexpr int kLoads = 4;       // 16-byte loads of B per lane, block and pass
constexpr int kHidden = kGroupTokens * (kMaxRank + 32);  // of h per item, see hidden_stride()

struct ExpandParams {
    const float* h;      // [planes][tokens][h_stride]
    const float* scale;  // [tokens] the requests' own factors
    i64 h_plane;
    int h_stride;
    int num_planes;
    int slice_begin[kSlices + 1];  // first fused output of each slice; unused slices are empty
};
static_assert(sizeof(ExpandParams) == 48, "params.py mirrors it");

// Rows of hidden_stride() elements, one per token.
#ifdef LORAPLEX_FP32
struct HiddenTile {
    float v[kHidden];
};
#else
struct HiddenTile {
    alignas(16) u16 high[kHidden];
    alignas(16) u16 low[kHidden];
};
#endif

// Whole steps of 32, and odd ones: fragment reads of neighbouring tokens meet in different banks.
__device__ __forceinline__ int hidden_stride(int rank) { return (rank + 31) / 32 * 32 | 32; }

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

__device__ __forceinline__ int first_rank_row(const OpEntry& e, int slice) {
    int row = 0;
#pragma unroll
    for (int s = 0; s < kSlices - 1; ++s) row += s < slice ? e.rank[s] : 0;
    return row;
}

constexpr int kItemBlocks = 8;  // most blocks of an item
static_assert(kBatch * kItemBlocks == kExpandThreads, "a thread walks to each");

// What an item's slice looks like: rank 0 where the adapter leaves it alone, or there is none.
struct SliceInfo {
    int rank;
    int first_row;  // of the stacked h
    float scaling;
    int index;
};

struct ExpandBatch {
    ItemBatch batch;
    SliceInfo slices[kBatch];
    i64 block[kExpandThreads];  // pool offset of B's first row of each block of the batch's items; fp32, whose tiles may
                                // be narrower than a block: the row's number
};

// Walks to the weights of up to kBatch items, `first` on; returns how many there are.
__device__ __forceinline__ int resolve(const LoraTables& t, const ExpandParams& p, int first, int num_items,
                                       ExpandBatch& shared) {
    const int which = threadIdx.x / kItemBlocks, block = threadIdx.x % kItemBlocks;
    if (item_index(first + which) < num_items) {
        const Work work = fetch_work(t, item_index(first + which));
        const Quad group = load_group_part(t, work.item, block);
        const int slice = slice_of(p, work.item.begin);
        const int n = work.item.begin - p.slice_begin[slice] + block * kBlockRows;
        const int rank = work.entry == nullptr ? 0 : work.entry->rank[slice];
        if (block == 0) {
            shared.batch.items[which] = work.item;
            SliceInfo info = {rank, 0, 0.f, slice};
            if (rank > 0) info.first_row = first_rank_row(*work.entry, slice), info.scaling = work.entry->scaling[slice];
            shared.slices[which] = info;
        }
        if (rank > 0 && block * kBlockRows < work.item.extent)
#ifdef LORAPLEX_FP32
            shared.block[threadIdx.x] = n;
#else
            shared.block[threadIdx.x] = b_address(t, *work.entry, slice, n) - t.pool;
#endif
        keep_group_part(shared.batch, which, block, group);
    }
    __syncthreads();
    return items_left(num_items, first, kBatch);
}

// Sums the planes of the group's h for one slice and scales; columns up to the next multiple of 32 are zeroed, tokens the
// group does not have are left as they are: their results are nobody's.
__device__ __forceinline__ void stage_hidden(const ExpandParams& p, const SliceInfo& slice, const Group& group,
                                             HiddenTile& tile) {
    const int rank = slice.rank, padded = (rank + 31) / 32 * 32, stride = hidden_stride(rank);
#pragma unroll 1
    for (int i = threadIdx.x; i < group.count * padded; i += kExpandThreads) {
        const int t = i / padded, r = i % padded, token = group.tokens[t];
        float v = 0.f;
        if (r < rank) {
            const float* from = p.h + static_cast<i64>(token) * p.h_stride + slice.first_row + r;
            int plane = 0;
#pragma unroll 1
            for (; plane + 4 <= p.num_planes; plane += 4, from += 4 * p.h_plane) {  // four loads in flight
                const float a = from[0], b = from[p.h_plane], c = from[2 * p.h_plane], d = from[3 * p.h_plane];
                v = (((v + a) + b) + c) + d;
            }
#pragma unroll 1
            for (; plane < p.num_planes; ++plane, from += p.h_plane) v += from[0];
            v *= slice.scaling * p.scale[token];
        }
#ifdef LORAPLEX_FP32
        tile.v[t * stride + r] = v;
#else
        const u16 high = bf16_bits(v);
        tile.high[t * stride + r] = high;
        tile.low[t * stride + r] = bf16_bits(v - to_float(bf16{high}));
#endif
    }
}

// How a lane's 16 bytes of B lie; chosen by rank once per item, so that each way keeps only its own registers.
enum class Rows {
    kNone,       // the adapter leaves this projection alone
    kOne,        // four lanes read 64 bytes of one row
    kTwo,        // ... the two rows of rank 16
    kFour,       // ... the four rows of rank 8
    kUnaligned,  // any rank, 2 bytes at a time
};
__device__ __forceinline__ Rows rows_of(int rank) {
    return rank == 0 ? Rows::kNone : rank % 8 != 0 ? Rows::kUnaligned : rank == 8 ? Rows::kFour
           : rank == 16 ? Rows::kTwo : Rows::kOne;
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

// One block of outputs on its way: where B's rows are, and what of them was asked for.
struct Block {
    int rows;  // live outputs, a multiple of 8
    int rank;
#ifdef LORAPLEX_FP32
    const OpEntry* entry;
    int slice, n;
#else
    const u8* b;  // first row of the block
    Quad loads[kLoads];
#endif
};

#ifndef LORAPLEX_FP32
// 8 values of a row from k on, zero past the rank. Rolled up: odd ranks are rare, registers are not to be had.
__device__ __forceinline__ Quad load_unaligned(const u8* row, int k, int rank) {
    const u16* from = reinterpret_cast<const u16*>(row) + k;
    u64 low = 0, high = 0;
#pragma unroll 1
    for (int j = min(8, rank - k) - 1; j >= 0; --j) {
        high = high << 16 | low >> 48;
        low = low << 16 | from[j];
    }
    return {static_cast<u32>(low), static_cast<u32>(low >> 32), static_cast<u32>(high), static_cast<u32>(high >> 32)};
}

// The loads of one pass: with a row per four lanes, pass i takes outputs 8 g + 4 (i % 2) .. + 3 and k from 32 (i / 2) on;
// else one pass takes all.
template <Rows kRows>
__device__ __forceinline__ void load_pass(const Block& block, int pass, Quad (&to)[kLoads]) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
    const bool is_live = kLaneRows * g < block.rows;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) to[i] = Quad{};
    if constexpr (kRows == Rows::kTwo) {
        const u8* from = block.b + (kLaneRows * g + c / 2) * 32 + c % 2 * 16;
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            if (is_live) to[i] = load_weights16(from + i * 64);
    } else if constexpr (kRows == Rows::kFour) {
        const u8* from = block.b + (kLaneRows * g + c) * 16;
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (is_live) to[i] = load_weights16(from + i * 64);
    } else if constexpr (kRows != Rows::kNone) {
        const int k = pass / 2 * 32 + c * 8, row_bytes = block.rank * 2;
        const u8* from = block.b + (kLaneRows * g + pass % 2 * 4) * row_bytes;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            if (!is_live || k >= block.rank) continue;
            if constexpr (kRows == Rows::kOne) {
                to[i] = load_weights16(from + i * row_bytes + k * 2);
            } else {
                to[i] = load_unaligned(from + i * row_bytes, k, block.rank);
            }
        }
    }
}

// d[4] of rows (upper, lower) += weights * h, where a lane's Quad of h is 8 values of k.
__device__ __forceinline__ void multiply(float (&d)[4], const Quad& upper, const Quad& lower, const Quad& h) {
    mma_bf16(d, upper.x, lower.x, upper.y, lower.y, h.x, h.y);
    mma_bf16(d, upper.z, lower.z, upper.w, lower.w, h.z, h.w);
}
__device__ __forceinline__ Quad masked(const Quad& q, bool keep) { return keep ? q : Quad{}; }

// A product's rows g and g + 8 are the block's outputs 8 g + `upper` and 8 g + `lower`.
__device__ __forceinline__ void take(Delta& delta, const float (&d)[4], int upper, int lower) {
    delta.v[0][upper] = d[0];
    delta.v[1][upper] = d[1];
    delta.v[0][lower] = d[2];
    delta.v[1][lower] = d[3];
}
#endif

// Whether the second of two blocks is asked for with the first: where a row takes several passes, each is asked for
// during the one before anyway, and two blocks' passes would not fit the registers.
__device__ constexpr bool is_early(Rows rows, int block) {
    return rows == Rows::kTwo || rows == Rows::kFour || (rows == Rows::kOne && block == 0);
}

// Asks for the first rows of block `index` of an item: what a kernel does before it waits for anything.
template <Rows kRows, int kWhich>
__device__ __forceinline__ Block begin_block(const LoraTables& t, const ExpandBatch& shared, int which, int index,
                                             const SliceInfo& slice, int rows) {
    Block block;
    block.rows = rows;
    if constexpr (kRows != Rows::kNone) {
        block.rank = slice.rank;
        if (slice.rank == 0) block.rows = 0;
#ifdef LORAPLEX_FP32
        block.entry = t.entries + shared.batch.items[which].adapter * t.entry_stride;
        block.slice = slice.index, block.n = static_cast<int>(shared.block[which * kItemBlocks + index]);
#else
        block.b = t.pool;
        if (block.rows > 0) block.b += shared.block[which * kItemBlocks + index];
        if constexpr (is_early(kRows, kWhich)) load_pass<kRows>(block, 0, block.loads);
#endif
    }
    return block;
}

// The block's delta, h staged; uses up the loads that begin_block() made.
template <Rows kRows, int kWhich>
__device__ __forceinline__ Delta finish_block(const LoraTables& t, Block& block, const HiddenTile& hidden) {
    Delta delta = {};
    if constexpr (kRows == Rows::kNone) return delta;
    const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
#ifdef LORAPLEX_FP32
    if (kLaneRows * g >= block.rows) return delta;
    for (int j = 0; j < kLaneRows; ++j) {
        const u8* row = b_address(t, *block.entry, block.slice, block.n + kLaneRows * g + j);
        const float* b = reinterpret_cast<const float*>(row);
        for (int which = 0; which < 2; ++which) {
            const float* h = hidden.v + (2 * c + which) * hidden_stride(block.rank);
            for (int k = 0; k < block.rank; ++k) delta.v[which][j] += b[k] * h[k];
        }
    }
#else
    if (block.rows <= 0) return delta;
    const int at = g * hidden_stride(block.rank);
    const auto fragment = [&](const u16* plane, int k) { return *reinterpret_cast<const Quad*>(plane + at + k); };
    if constexpr (!is_early(kRows, kWhich)) load_pass<kRows>(block, 0, block.loads);
    float d[4][4] = {};
    if constexpr (kRows == Rows::kTwo) {
        const Quad high = fragment(hidden.high, c % 2 * 8), low = fragment(hidden.low, c % 2 * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // the even and the odd rows of each pair of loads
            const int pair = i / 2 * 2, odd = i % 2;
            multiply(d[i], block.loads[pair], block.loads[pair + 1], masked(high, c / 2 == odd));
            multiply(d[i], block.loads[pair], block.loads[pair + 1], masked(low, c / 2 == odd));
            take(delta, d[i], 2 * pair + odd, 2 * pair + 2 + odd);
        }
    } else if constexpr (kRows == Rows::kFour) {
        const Quad high = fragment(hidden.high, 0), low = fragment(hidden.low, 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            multiply(d[i], block.loads[0], block.loads[1], masked(high, c == i));
            multiply(d[i], block.loads[0], block.loads[1], masked(low, c == i));
            take(delta, d[i], i, 4 + i);
        }
    } else {
#pragma unroll 1
        for (int k = 0; k < block.rank; k += 32) {  // outputs 8 g .. + 3, then 8 g + 4 .. + 7
            const Quad high = fragment(hidden.high, k + c * 8), low = fragment(hidden.low, k + c * 8);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Quad now[kLoads];
#pragma unroll
                for (int i = 0; i < kLoads; ++i) now[i] = block.loads[i];
                load_pass<kRows>(block, k / 16 + half + 1, block.loads);  // past the rank: zeros
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    multiply(d[2 * half + i], now[2 * i], now[2 * i + 1], high);
                    multiply(d[2 * half + i], now[2 * i], now[2 * i + 1], low);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) take(delta, d[i], 2 * i, 2 * i + 1);
    }
#endif
    return delta;
}

// This lane's token `which` (0 or 1) of a group, or -1.
__device__ __forceinline__ int lane_token(const Group& group, int which) {
    const int t = threadIdx.x % 4 * 2 + which;
    return t < group.count ? group.tokens[t] : -1;
}
// This lane's first output of a block.
__device__ __forceinline__ int lane_row() { return threadIdx.x % kWarp / 4 * kLaneRows; }

// Eight neighbouring elements as they lie in memory: half the registers of their floats.
struct Octet {
    Vec vecs[kLaneRows / kVec];
    __device__ __forceinline__ float get(int j) const { return to_float(vecs[j / kVec].v[j % kVec]); }
    __device__ __forceinline__ void set(int j, float v) { vecs[j / kVec].v[j % kVec] = from_float<elem>(v); }
};
__device__ __forceinline__ Octet load_octet(const elem* from) {
    Octet o;
#pragma unroll
    for (int i = 0; i < kLaneRows / kVec; ++i) o.vecs[i] = load_vec(from + i * kVec);
    return o;
}
__device__ __forceinline__ void store_octet(elem* to, const Octet& o) {
#pragma unroll
    for (int i = 0; i < kLaneRows / kVec; ++i) store_vec(to + i * kVec, o.vecs[i]);
}
__device__ __forceinline__ Octet octet_of(const Delta& delta, int which) {
    Octet o;
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) o.set(j, delta.v[which][j]);
    return o;
}
// What is there plus a token's delta.
__device__ __forceinline__ Octet load_sum(const elem* from, const Delta& delta, int which) {
    Octet o = load_octet(from);
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) o.set(j, o.get(j) + delta.v[which][j]);
    return o;
}
