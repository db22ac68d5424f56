// h[plane][t] = x[t, chunk] * A[:, chunk]^T for the tokens of an adapter, all slices of an op stacked: the first half of
// LoRA at decode. A plane holds the share of PLANE columns; whoever reads h sums planes in order, so no atomics, no
// memset, and a token's result does not depend on its batch.
//
// Work item: (group of <= 8 tokens, or two of one adapter, 16 rank rows, plane); begin = first rank row / 16, extent = plane,
// and kTwoGroups if the item is the next group's, too: weights are then read once for both. Grid: any; CTAs stride over the
// items. Block: 8 warps; of each 1024 columns, warp w takes the w-th 128.
// bf16: mma.m16n8k16 with rank rows as M and tokens as N; both operands go from global memory straight into fragments
// (a lane's 16 bytes are 8 columns of one row: the order of k inside a product is free), 8 loads in flight per lane.
// fp32: the same mapping with scalar FMAs.
// Shared memory: 14 KiB. Alignment: columns % 8 == 0, x rows on 16 bytes.
// Registers: 3 CTAs of 256 threads per SM, hence at most 80. Architectures: sm_80 and up.
// Sources: Chen et al., arXiv:2310.18547 (Punica); Sheng et al., arXiv:2311.03285 (S-LoRA).
#include "lora/table.cuh"

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = 16;
constexpr int kWarpColumns = 128;
constexpr int kChunk = kWarps * kWarpColumns;
constexpr int kSteps = kWarpColumns / 32;  // 32 columns: 4 lanes x 16 bytes of bf16
constexpr int kTwoGroups = 1 << 16;
constexpr int kPiece = 64;  // columns that lie in one tile, unless tiles are narrower

struct Params {
    LoraTables lora;
    const elem* x;  // [tokens, columns]
    float* h;       // [planes][tokens][h_stride]
    i64 h_plane;    // floats from one plane to the next
    int h_stride;
    int columns;
    int plane_columns;  // a multiple of 1024, at most 16384
    int reserved;
};
static_assert(sizeof(Params) == 96, "params.py mirrors it");

struct Shared {
    ItemBatch<2> batch;
    int stacked[kBatch];
    int a_step[kBatch];
    i64 piece[kThreads];  // pool offset of the first rank row of every 64 columns of the batch's items
    int width[kThreads];  // columns of the tile it lies in
    float partial[2][kWarps][kRows][kGroupTokens];
};

__device__ __forceinline__ int plane_of(const Item& item) { return item.extent % kTwoGroups; }
__device__ __forceinline__ int groups_of(const Item& item) { return 1 + item.extent / kTwoGroups; }

// Walks to the weights of up to a batch of items, `first` on; returns how many there are.
__device__ __forceinline__ int resolve(const Params& p, int first_item, int first, int num_items, Shared& shared) {
    const int pieces = p.plane_columns / kPiece, room = min(kBatch, kThreads / pieces);
    const int which = threadIdx.x / pieces, piece = threadIdx.x % pieces;
    if (which < room && item_index(first + which) < num_items) {
        const Item item = load_item(p.lora, first_item + item_index(first + which));
        const AEntry e = load_a_entry(p.lora, item.adapter);
        const Quad group = load_group_part(p.lora, item, piece, groups_of(item));
        const int column = plane_of(item) * p.plane_columns + piece * kPiece, tile = column / max(1, e.a_step);
        prefetch_next_entry(p.lora, item.adapter, piece);
        if (piece == 0) {
            shared.batch.items[which] = item;
            shared.stacked[which] = e.stacked_rank;
            shared.a_step[which] = e.a_step;
        }
        if (e.stacked_rank > 0 && column < p.columns) {
            const int start = tile * e.a_step;
            shared.piece[threadIdx.x] = a_tile(p.lora, e, tile) + (column - start) * static_cast<int>(sizeof(elem));
            shared.width[threadIdx.x] = min(e.a_step, p.columns - start);
        }
        keep_group_part(shared.batch.groups[which], piece, groups_of(item), group);
    }
    __syncthreads();
    return items_left(num_items, first, room);
}

// Where columns [column, column + 8) of rank row `row` lie; `piece` is the item's 64 columns around them.
__device__ __forceinline__ const u8* row_address(const Params& p, const Shared& shared, int which, int piece, int row,
                                                 int column) {
    if (shared.a_step[which] >= kPiece) {
        const i64 within = static_cast<i64>(row) * shared.width[piece] + column % kPiece;
        return p.lora.pool + shared.piece[piece] + within * static_cast<i64>(sizeof(elem));
    }
    const Item& item = shared.batch.items[which];  // a stacked rank of over 256 (fp32: 128): tiles of 32, 16 or 8 columns
    return a_address(p.lora, load_a_entry(p.lora, item.adapter), row, column, p.columns);
}

#ifdef LORAPLEX_FP32
struct Fragment {
    float v[8];
};
__device__ __forceinline__ Fragment load_fragment(const u8* from) {
    Fragment f;
    *reinterpret_cast<Quad*>(f.v) = *reinterpret_cast<const Quad*>(from);
    *reinterpret_cast<Quad*>(f.v + 4) = *reinterpret_cast<const Quad*>(from + 16);
    return f;
}
#endif

#ifndef LORAPLEX_FP32
// Rank rows `row` and `row` + 8 of a warp's 128 columns, 8 of every 32 from `column` on.
__device__ __forceinline__ void load_rows(const Params& p, const Shared& shared, int which, int piece, int row, int column,
                                          bool upper, bool lower, Quad (&a0)[kSteps], Quad (&a1)[kSteps]) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) a0[s] = a1[s] = Quad{};
    if (!upper) return;
    if (shared.a_step[which] < kPiece) {  // narrow tiles: each 8 columns have their own
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            if (column + s * 32 >= p.columns) continue;
            a0[s] = load_weights16(row_address(p, shared, which, piece, row, column + s * 32));
            if (lower) a1[s] = load_weights16(row_address(p, shared, which, piece, row + 8, column + s * 32));
        }
        return;
    }
#pragma unroll
    for (int s = 0; s < kSteps; s += 2) {
        if (column + s * 32 >= p.columns) continue;
        const int width = shared.width[piece + s / 2];
        const u8* from = p.lora.pool + shared.piece[piece + s / 2] + (row * width + column % kPiece) * 2;
        const bool more = column + s * 32 + 32 < p.columns;
        a0[s] = load_weights16(from);
        if (more) a0[s + 1] = load_weights16(from + 64);
        if (lower) a1[s] = load_weights16(from + width * 16);
        if (lower && more) a1[s + 1] = load_weights16(from + width * 16 + 64);
    }
}
#endif

// A lane's sums of rows g and g + 8 with tokens 2c and 2c + 1 of group `half`.
__device__ __forceinline__ void keep(Shared& shared, int half, bool is_first, const float (&d)[4]) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float& to = shared.partial[half][threadIdx.x / kWarp][g + i / 2 * 8][2 * c + i % 2];
        to = is_first ? d[i] : to + d[i];
    }
}

#ifdef LORAPLEX_FP32
// Sums of rows row + g and row + g + 8 with a group's tokens.
__device__ __forceinline__ void multiply_group(const Params& p, const Shared& shared, int which, int piece, int row, int column,
                                               bool upper, bool lower, const Group& group, float (&d)[4]) {
    for (int t = 0; t < group.count; ++t) {
        const float* x = p.x + static_cast<i64>(group.row(t)) * p.columns;
        float sums[2] = {};
        for (int s = 0; s < kSteps; ++s) {
            const int k = column + s * 32;
            if (k >= p.columns) break;
            Fragment a0 = {}, a1 = {};
            if (upper) a0 = load_fragment(row_address(p, shared, which, piece + s / 2, row, k));
            if (lower) a1 = load_fragment(row_address(p, shared, which, piece + s / 2, row + 8, k));
            for (int j = 0; j < 8; ++j) {
                sums[0] += a0.v[j] * x[k + j];
                sums[1] += a1.v[j] * x[k + j];
            }
        }
        for (int half = 0; half < 2; ++half) {
            float v = sums[half];
            v += __shfl_xor_sync(kFullMask, v, 1);
            v += __shfl_xor_sync(kFullMask, v, 2);
            if (t / 2 == static_cast<int>(threadIdx.x) % 4) d[half * 2 + t % 2] = v;
        }
    }
}
#else
__device__ __forceinline__ void multiply_group(const Params& p, const Group& group, int column, const Quad (&a0)[kSteps],
                                               const Quad (&a1)[kSteps], float (&d)[4]) {
    const int g = threadIdx.x % kWarp / 4;
    const elem* from = p.x + static_cast<i64>(g < group.count ? group.row(g) : 0) * p.columns + column;
    Quad x[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        x[s] = Quad{};
        if (g < group.count && column + s * 32 < p.columns) x[s] = *reinterpret_cast<const Quad*>(from + s * 32);
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        mma_bf16(d, a0[s].x, a1[s].x, a0[s].y, a1[s].y, x[s].x, x[s].y);
        mma_bf16(d, a0[s].z, a1[s].z, a0[s].w, a1[s].w, x[s].z, x[s].w);
    }
}
#endif

// The warp's 128 columns from `column` on; `piece` is the first of its two pieces.
__device__ __forceinline__ void warp_product(const Params& p, Shared& shared, int which, int column, int piece, bool is_first) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4, k0 = column + c * 8;
    const Item& item = shared.batch.items[which];
    const int row = item.begin * kRows + g, stacked = shared.stacked[which];
    const bool upper = row < stacked, lower = row + 8 < stacked;
#ifndef LORAPLEX_FP32
    Quad a0[kSteps], a1[kSteps];
    load_rows(p, shared, which, piece, row, k0, upper, lower, a0, a1);
#endif
    dependency_wait();
#pragma unroll 1
    for (int number = 0; number < groups_of(item); ++number) {
        const Group& group = shared.batch.groups[which][number];
        float d[4] = {};
#ifdef LORAPLEX_FP32
        multiply_group(p, shared, which, piece, row, k0, upper, lower, group, d);
#else
        multiply_group(p, group, k0, a0, a1, d);
#endif
        keep(shared, number, is_first, d);
    }
}

// Adds the warps' sums in order and writes the item's part of h.
__device__ __forceinline__ void store_rows(const Params& p, const Shared& shared, int which) {
    const Item& item = shared.batch.items[which];
    const Group(&groups)[2] = shared.batch.groups[which];
    const int count = groups[0].count + (groups_of(item) == 2 ? groups[1].count : 0);
    const int live = shared.stacked[which] - item.begin * kRows;
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * count; i += kThreads) {
        const int r = i % kRows, half = i / kRows / kGroupTokens, t = i / kRows % kGroupTokens;
        if (r >= live) continue;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += shared.partial[half][w][r][t];
        p.h[plane_of(item) * p.h_plane + static_cast<i64>(groups[half].tokens[t]) * p.h_stride + item.begin * kRows + r] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 3) lora_shrink(const Params p) {
    __shared__ Shared shared;
    allow_dependents();
    const Pair range = load_range(p.lora);
    const int num_items = static_cast<int>(range.y), warp = threadIdx.x / kWarp, pieces = p.plane_columns / kPiece;
#pragma unroll 1
    for (int first = 0; item_index(first) < num_items;) {
        const int count = resolve(p, static_cast<int>(range.x), first, num_items, shared);
#pragma unroll 1
        for (int which = 0; which < count; ++which) {
            const Item& item = shared.batch.items[which];
            if (item.begin * kRows >= shared.stacked[which]) continue;  // this layer's rank is below the adapter's largest
#pragma unroll 1
            for (int chunk = 0; chunk < p.plane_columns; chunk += kChunk) {
                const int within = chunk + warp * kWarpColumns;
                const int piece = which * pieces + within / kPiece;
                warp_product(p, shared, which, plane_of(item) * p.plane_columns + within, piece, chunk == 0);
            }
            __syncthreads();
            store_rows(p, shared, which);
            __syncthreads();
        }
        first += count;
        __syncthreads();
    }
    dependency_wait();  // a CTA without items must not let its grid complete before the one it depends on
}
