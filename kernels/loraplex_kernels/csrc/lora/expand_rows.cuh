// How B's rows lie in a pass, by rank, and what becomes of them: the products of lora/expand.cu.
//
// mma.m16n8k16 with outputs as M, rank as K, tokens as N. B's rows are 2 r bytes and contiguous; a lane (g, c) of a pass copies
// vectors i = 0..3 of 16 bytes, 8 values of k of one row, such that four lanes read 64 bytes in a row:
//   rank >= 24: row 8 g + i (then 8 g + 4 + i), k = 8 c of 32.
//   rank 16:    row 8 g + 2 i + c / 2, k = 8 (c % 2).
//   rank 8:     row 8 g + 4 (i % 2) + c; i / 2 is the block, of two.
// The vectors i of the eight lanes (., c) are an 8x8 matrix (i, c), and four of those an operand A, whose rows g and g + 8 are
// neighbouring outputs of 8 g .. 8 g + 7: so lane (g, c) ends with these for tokens 2 c and 2 c + 1, a 16-byte vector of y each.
// h is split into two bf16 (high + low), so the product keeps the fp32 precision of h at the price of idle tensor cores.
#pragma once
#include "lora/expand_ring.cuh"

#ifdef LORAPLEX_FP32
__device__ __forceinline__ Delta block_delta(const LoraTables& t, const ExpandParams& p, const Item& item,
                                             const SliceInfo& slice, const Group& group, const Block& block) {
    Delta delta = {};
    const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
    if (kLaneRows * g >= block.rows) return delta;
    const BEntry entry = load_b_entry(t, item.adapter, slice.index);
    for (int which = 0; which < 2 && 2 * c + which < group.count; ++which) {
        const int token = group.tokens[2 * c + which];
        const float* from = p.h + static_cast<i64>(token) * p.h_stride + slice.first_row;
        const float scale = slice.scaling * p.scale[token];
        for (int k = 0; k < slice.rank; ++k) {
            float h = 0.f;
            for (int plane = 0; plane < p.num_planes; ++plane) h += from[plane * p.h_plane + k];
            h *= scale;
            for (int j = 0; j < kLaneRows; ++j) {
                const u8* row = t.pool + b_offset(t, entry, static_cast<int>(block.offset) + kLaneRows * g + j);
                delta.v[which][j] += reinterpret_cast<const float*>(row)[k] * h;
            }
        }
    }
    return delta;
}
#else
// Two values as two bf16 each.
__device__ __forceinline__ void split(float first, float second, u32& high, u32& low) {
    high = pack_bf16(first, second);
    low = pack_bf16(first - low_float(high), second - high_float(high));
}
__device__ __forceinline__ void load_pair(const float* from, int first_row, float (&v)[2]) {
    if (first_row % 2 == 0) {
        const Pair pair = *reinterpret_cast<const Pair*>(from);
        v[0] = __uint_as_float(pair.x), v[1] = __uint_as_float(pair.y);
    } else {
        v[0] = from[0], v[1] = from[1];
    }
}

// Operand B: values k, k + 1 of each pair for a lane's token g, as two bf16 each; pairs are 8 values apart.
template <int kPairs>
struct Hidden {
    u32 high[kPairs], low[kPairs];
};

// From value k of h of one slice of rank 8 or 16 on: planes summed in order, scaled; zeros for tokens that the group does not have.
template <int kPairs>
__device__ __forceinline__ Hidden<kPairs> load_hidden(const ExpandParams& p, const SliceInfo& slice, const Group& group,
                                                      int k) {
    constexpr int kPlanesAtOnce = 4;
    const int g = threadIdx.x % kWarp / 4;
    float v[kPairs][2] = {}, scale = 0.f;
    if (g < group.count) {
        const int token = group.tokens[g];
        const float* from = p.h + static_cast<i64>(token) * p.h_stride + slice.first_row + k;
        scale = slice.scaling * p.scale[token];
#pragma unroll 1
        for (int plane = 0; plane < p.num_planes; plane += kPlanesAtOnce, from += kPlanesAtOnce * p.h_plane) {
            float values[kPlanesAtOnce][kPairs][2] = {};
#pragma unroll
            for (int i = 0; i < kPlanesAtOnce; ++i) {
                if (plane + i >= p.num_planes) continue;
#pragma unroll
                for (int j = 0; j < kPairs; ++j) load_pair(from + i * p.h_plane + 8 * j, slice.first_row, values[i][j]);
            }
#pragma unroll
            for (int i = 0; i < kPlanesAtOnce; ++i) {
#pragma unroll
                for (int j = 0; j < kPairs; ++j) v[j][0] += values[i][j][0], v[j][1] += values[i][j][1];
            }
        }
    }
    Hidden<kPairs> hidden;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) split(v[j][0] * scale, v[j][1] * scale, hidden.high[j], hidden.low[j]);
    return hidden;
}

// h of a group of a larger rank, staged by the whole block: rows of stride_of() words of two values.
constexpr int kHiddenWords = kGroupTokens * (kMaxRank + 8) / 2;
struct HiddenTile {
    u32 high[kHiddenWords], low[kHiddenWords];
};
// Whole steps of 32 values, and 4 words: the lanes of an operand read different banks.
__device__ __forceinline__ int stride_of(int rank) { return (rank + 31) / 32 * 16 + 4; }

// Planes of `kValues` neighbouring values summed in order, up to four loads on their way.
template <int kValues>
__device__ __forceinline__ void sum_planes(const ExpandParams& p, const float* from, float (&v)[kValues]) {
    struct alignas(4 * kValues) Values {
        float v[kValues];
    };
    const auto add = [&](const Values& values) {
#pragma unroll
        for (int j = 0; j < kValues; ++j) v[j] += values.v[j];
    };
    const auto load = [&](int plane) { return *reinterpret_cast<const Values*>(from + plane * p.h_plane); };
    int plane = 0;
#pragma unroll 1
    for (; plane + 4 <= p.num_planes; plane += 4) {
        const Values a = load(plane), b = load(plane + 1), c = load(plane + 2), d = load(plane + 3);
        add(a), add(b), add(c), add(d);
    }
#pragma unroll 1
    for (; plane < p.num_planes; ++plane) add(load(plane));
}

// `turn` places on around the tokens of a group; of none, known to the compiler, there is nothing to compute.
__device__ __forceinline__ int turned(int token, int turn) { return turn == 0 ? token : (token + turn) % kGroupTokens; }

// 16 threads a token, four values each: a round takes as long as a load from the L2, and up to rank 64 there is one. Values past
// the rank are zeros; tokens that the group does not have are left as they are: their results are nobody's. h begins at word
// `begin` of the tile, and token 0 is the last `turn` threads' of 16.
__device__ __forceinline__ void stage_hidden(const ExpandParams& p, const SliceInfo& slice, const Group& group,
                                             HiddenTile& tile, int begin = 0, int turn = 0) {
    const int rank = slice.rank, padded = (rank + 31) / 32 * 32, t = turned(threadIdx.x / 16, turn);
    if (t >= group.count) return;
    const int token = group.tokens[t];
    const float* from = p.h + static_cast<i64>(token) * p.h_stride + slice.first_row;
    const float scale = slice.scaling * p.scale[token];
    const bool is_aligned = (rank | slice.first_row) % 4 == 0;
#pragma unroll 1
    for (int r = threadIdx.x % 16 * 4; r < padded; r += 64) {
        float v[4] = {};
        if (is_aligned && r < rank) sum_planes(p, from + r, v);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float one[1] = {};
            if (!is_aligned && r + j < rank) sum_planes(p, from + r + j, one), v[j] = one[0];
        }
        const int at = begin + t * stride_of(rank) + r / 2;
        split(v[0] * scale, v[1] * scale, tile.high[at], tile.low[at]);
        split(v[2] * scale, v[3] * scale, tile.high[at + 1], tile.low[at + 1]);
    }
}
// Operands of 8 values a pair from k on: 32 of ranks above 16.
template <int kPairs = 4>
__device__ __forceinline__ Hidden<kPairs> read_hidden(const HiddenTile& tile, int rank, int k, int begin = 0) {
    const int lane = threadIdx.x % kWarp, at = begin + lane / 4 * stride_of(rank) + k / 2 + lane % 4;
    Hidden<kPairs> hidden;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) hidden.high[j] = tile.high[at + 4 * j], hidden.low[j] = tile.low[at + 4 * j];
    return hidden;
}

__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    mma_bf16(d, a[0], a[1], a[2], a[3], b0, b1);
}

// A product's rows g and g + 8 are outputs 8 g + 2 i and the one after it, of a lane's two tokens.
__device__ __forceinline__ void take(Delta& delta, const float (&d)[4], int i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) delta.v[j % 2][2 * i + j / 2] = d[j];
}

constexpr int kTwoPairs = 2, kFourPairs = 1;

// A block's delta at rank 16.
__device__ __forceinline__ Delta block_delta(const Fragments& a, const Hidden<kTwoPairs>& hidden) {
    Delta delta;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float d[4] = {};
        multiply(d, a.v[i], hidden.high[0], hidden.high[1]);
        multiply(d, a.v[i], hidden.low[0], hidden.low[1]);
        take(delta, d, i);
    }
    return delta;
}
// A block's delta at rank 8: an operand's halves of k are different rows, so h takes one of them and zeros the other.
__device__ __forceinline__ Delta block_delta(const Fragments& a, int block, const Hidden<kFourPairs>& hidden) {
    Delta delta;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float d[4] = {};
        const u32(&rows)[4] = a.v[2 * block + i / 2];
        multiply(d, rows, i % 2 ? 0 : hidden.high[0], i % 2 ? hidden.high[0] : 0);
        multiply(d, rows, i % 2 ? 0 : hidden.low[0], i % 2 ? hidden.low[0] : 0);
        take(delta, d, i);
    }
    return delta;
}
// A block's delta in passes over 32 values of k of outputs 8 g .. 8 g + 3, then of 8 g + 4 .. + 7: next(half, k, fragments).
template <class Next>
__device__ __forceinline__ Delta block_delta(const HiddenTile& tile, int rank, Next next, int begin = 0) {
    Delta delta;
    float d[4][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll 1
        for (int k = 0; k < rank; k += 32) {
            const Hidden<4> hidden = read_hidden(tile, rank, k, begin);
            Fragments a;
            next(half, k, a);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int j = 0; j < 2; ++j)
                    multiply(d[2 * half + i], a.v[2 * i + j], hidden.high[2 * j], hidden.high[2 * j + 1]);
#pragma unroll
                for (int j = 0; j < 2; ++j) multiply(d[2 * half + i], a.v[2 * i + j], hidden.low[2 * j], hidden.low[2 * j + 1]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) take(delta, d[i], i);
    return delta;
}

// A pass's operands of rows that no copy can take: straight from where they are.
__device__ __forceinline__ void load_unaligned(const u8* pool, const Block& block, int rank, int half, int begin,
                                               Fragments& to) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
    const bool is_live = kLaneRows * g < block.rows;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        in_order();  // more loads at a time would cost registers that odd ranks are not worth
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int row = kLaneRows * g + half * 4 + i / 2 * 2 + j % 2;
            const int k = begin + i % 2 * 16 + j / 2 * 8 + c * 2;
            const u16* from = reinterpret_cast<const u16*>(pool + block.base(g)) + row * rank + k;
            const u32 low = is_live && k < rank ? from[0] : 0, high = is_live && k + 1 < rank ? from[1] : 0;
            to.v[i][j] = high << 16 | low;
        }
    }
}
#endif
