// y[t, n] += scaling * scale[t] * (sum over planes of h[plane][t]) * B^T for runs of tokens of one adapter: the second
// half of LoRA at prefill.
//
// Work item: (<= 64 tokens, RUN outputs): part = run number, counted over all slices, each of whole runs and a rest.
// Grid: any; CTAs stride over the items. Block: 4 warps of 16 tokens. bf16 only: mma.m16n8k16 with tokens as M, outputs
// as N, rank as K; h split into high + low bf16 as in lora_expand.cuh, 64 rank rows at a time; B staged in shared memory
// as it lies in its tile. Blocks of 32 outputs are numbered so that a lane ends with 8 neighbouring outputs of a token:
// y is read and written as 16-byte vectors. Shared memory: 2 x 20 KiB of B (the next step's is on its way) + 20 KiB of h. Alignment: y rows on 16 bytes.
// Registers: 3 CTAs of 128 threads per SM, hence at most 168. Architectures: sm_80 and up.
// Source: Chen et al., arXiv:2310.18547 (Punica's SGMV).
#include "lora_prefill.cuh"

constexpr int kThreads = 128;
constexpr int kTokens = 64;
constexpr int kRankBlock = 64;
constexpr int kOutputs = 128;  // per staging of B: 128 x 64 x 2 bytes
constexpr int kBlocks = kOutputs / 32;
constexpr int kHPad = 16;  // rows 160 bytes apart: the 8-byte reads of 4 rows meet no bank conflict
constexpr int kRun = RUN;
static_assert(kRun % kOutputs == 0, "a run is whole stagings");

struct Params {
    LoraTables lora;
    const float* h;      // [planes][tokens][h_stride]
    const float* scale;  // [tokens]
    elem* y;             // [tokens, y_stride]
    i64 h_plane;
    i64 y_stride;
    int h_stride;
    int num_planes;
    int slice_begin[kSlices + 1];
};
static_assert(sizeof(Params) == 120, "params.py mirrors it");

struct Shared {
    u16 weights[2][kOutputs][kRankBlock + kHPad];
    u16 high[kTokens][kRankBlock + kHPad];
    u16 low[kTokens][kRankBlock + kHPad];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "lora_prefill.py asks for it");

// Columns [r, r + 64) of h of the item's tokens, planes summed in order, scaled, zero past the rank.
__device__ __forceinline__ void stage_hidden(const Params& p, const Segment& item, const OpEntry& e, int slice, int first,
                                             int r, Shared& shared) {
    const int left = e.rank[slice] - r, shift = left > 32 ? 6 : left > 16 ? 5 : 4;  // columns: 64, 32 or 16
    for (int i = threadIdx.x; i < kTokens << shift; i += kThreads) {
        const int t = i >> shift, column = i & ((1 << shift) - 1);
        float v = 0.f;
        if (t < item.count && r + column < e.rank[slice]) {
            const float* from = p.h + static_cast<i64>(item.token_begin + t) * p.h_stride + first + r + column;
            int plane = 0;
            for (; plane + 4 <= p.num_planes; plane += 4, from += 4 * p.h_plane) {  // four loads in flight
                const float a = from[0], b = from[p.h_plane], c = from[2 * p.h_plane], d = from[3 * p.h_plane];
                v = (((v + a) + b) + c) + d;
            }
            for (; plane < p.num_planes; ++plane, from += p.h_plane) v += from[0];
            v *= e.scaling[slice] * p.scale[item.token_begin + t];
        }
        shared.high[t][column] = bf16_bits(v);
        shared.low[t][column] = bf16_bits(v - to_float(bf16{shared.high[t][column]}));
    }
}

// Starts the copy of columns [r, r + 64) of outputs [n, n + 128) of a slice's B, zero past the rank and the outputs.
__device__ __forceinline__ void stage_weights(const Params& p, const OpEntry& e, int slice, int n, int outputs, int r,
                                              u16 (&weights)[kOutputs][kRankBlock + kHPad]) {
    const int rank = e.rank[slice], step = e.b_step[slice], column = threadIdx.x % (kRankBlock / 8) * 8;
    const bool inside = column < (rank - r + 15) / 16 * 16;
#pragma unroll 1
    for (int half = 0; half < kOutputs; half += 64) {  // tiles end on multiples of 64 outputs
        if (n + half >= outputs && half > 0) break;     // read by mma, but only into outputs that do not exist
        const int tile = (n + half) / step;
        const u8* base = p.lora.pool + p.lora.tiles[e.b_first[slice] + tile] +
                         (static_cast<i64>(n + half - tile * step) * rank + r + column) * 2;
#pragma unroll
        for (int row = threadIdx.x / (kRankBlock / 8); row < 64; row += kThreads / (kRankBlock / 8)) {
            // Row 8 a + 2 j + b of a block of 32 goes where the mma for j reads its row 2 a + b.
            const int at = half + row / 32 * 32 + row % 8 / 2 * 8 + row % 32 / 8 * 2 + row % 2;
            const bool live = inside && n + half + row < outputs && r + column < rank;
            const u8* from = live ? base + row * rank * 2 : p.lora.pool;
            if (!inside) continue;
            if (rank % 8 == 0) {
                copy_async16(&weights[at][column], from, live);
            } else {  // rows are not aligned: one by one
                const u16* values = reinterpret_cast<const u16*>(from);
                for (int j = 0; j < 8; ++j) weights[at][column + j] = live && r + column + j < rank ? values[j] : 0;
            }
        }
    }
    copy_async_commit();
}

extern "C" __global__ void __launch_bounds__(kThreads, 3) lora_prefill_expand(const Params p) {
    LORAPLEX_SHARED(Shared, shared);
    allow_dependents();
    dependency_wait();
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
    const int first_item = p.lora.range[0], num_items = p.lora.range[1];
    for (int i = blockIdx.x; i < num_items; i += gridDim.x) {
        const Segment item = segments(p.lora)[first_item + i];
        const OpEntry& e = p.lora.entries[item.adapter * p.lora.entry_stride];
        int slice = 0, run = item.part, first = 0;
        while (run >= (p.slice_begin[slice + 1] - p.slice_begin[slice] + kRun - 1) / kRun) {
            run -= (p.slice_begin[slice + 1] - p.slice_begin[slice] + kRun - 1) / kRun;
            first += e.rank[slice++];
        }
        const int outputs = p.slice_begin[slice + 1] - p.slice_begin[slice], rank = e.rank[slice];
        if (rank == 0) continue;
        const auto y_row = [&](int half, int n) {
            return p.y + (item.token_begin + warp * 16 + g + 8 * half) * p.y_stride + p.slice_begin[slice] + n + 8 * c;
        };
        const auto is_live = [&](int half, int n) {
            return warp * 16 + g + 8 * half < item.count && n + 8 * c < outputs;
        };
        const auto load_y = [&](int half, int n, Vec (&y)[kBlocks]) {
#pragma unroll
            for (int o = 0; o < kBlocks; ++o) {
                y[o] = Vec{};
                if (is_live(half, n + o * 32)) y[o] = load_vec(y_row(half, n) + o * 32);
            }
        };
        const auto add_to_y = [&](int half, int n, Vec (&y)[kBlocks], const float (&d)[kBlocks][4][4]) {
#pragma unroll
            for (int o = 0; o < kBlocks; ++o) {
                if (!is_live(half, n + o * 32)) continue;
                u32* pairs = reinterpret_cast<u32*>(&y[o]);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    pairs[j] = pack_bf16(low_float(pairs[j]) + d[o][j][2 * half], high_float(pairs[j]) + d[o][j][2 * half + 1]);
                }
                store_vec(y_row(half, n) + o * 32, y[o]);
            }
        };
        const int rank_blocks = (rank + kRankBlock - 1) / kRankBlock, stop = min(outputs, (run + 1) * kRun);
        __syncthreads();  // the buffers are free again
        stage_weights(p, e, slice, run * kRun, outputs, 0, shared.weights[0]);
        int stage = 0;
        for (int n = run * kRun; n < stop; n += kOutputs) {
            Vec y[kBlocks];
            load_y(0, n, y);  // asked for now, needed last
            float d[kBlocks][4][4] = {};
            for (int block = 0; block < rank_blocks; ++block, stage ^= 1) {
                if (rank_blocks > 1 || n == run * kRun) {
                    if (block > 0 || n > run * kRun) __syncthreads();  // h is done with by all
                    stage_hidden(p, item, e, slice, first, block * kRankBlock, shared);
                }
                copy_async_wait<0>();
                __syncthreads();  // this step's h and B have landed, and the other buffer is done with by all
                const bool is_last_block = block + 1 == rank_blocks;
                const int next_n = is_last_block ? n + kOutputs : n, next_r = is_last_block ? 0 : (block + 1) * kRankBlock;
                if (next_n < stop) stage_weights(p, e, slice, next_n, outputs, next_r, shared.weights[stage ^ 1]);
                const int columns = min(kRankBlock, rank - block * kRankBlock), t = warp * 16 + g;
#pragma unroll 1
                for (int k = 4 * c; k - 4 * c < columns; k += 16) {
                    const Pair h0 = *reinterpret_cast<const Pair*>(&shared.high[t][k]);
                    const Pair h1 = *reinterpret_cast<const Pair*>(&shared.high[t + 8][k]);
                    const Pair l0 = *reinterpret_cast<const Pair*>(&shared.low[t][k]);
                    const Pair l1 = *reinterpret_cast<const Pair*>(&shared.low[t + 8][k]);
#pragma unroll
                    for (int o = 0; o < kBlocks; ++o)
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            const Pair b = *reinterpret_cast<const Pair*>(&shared.weights[stage][o * 32 + j * 8 + g][k]);
                            mma_bf16(d[o][j], h0.x, h1.x, h0.y, h1.y, b.x, b.y);
                            mma_bf16(d[o][j], l0.x, l1.x, l0.y, l1.y, b.x, b.y);
                        }
                }
            }
            add_to_y(0, n, y, d);
            load_y(1, n, y);
            add_to_y(1, n, y, d);
        }
    }
}
