// h[plane][t] = x[t, chunk] * A[:, chunk]^T for runs of tokens of one adapter, all slices of an op stacked: the first
// half of LoRA at prefill. Same planes as lora_shrink.cu, so the expands can read either.
//
// Work item: (<= 64 tokens, 64 rank rows, 1024 columns): part = rank block * planes + plane. Grid: any; CTAs stride over
// the items. Block: 4 warps of 16 tokens. bf16 only: mma.m16n8k16 with tokens as M, rank rows as N. x and A come in steps
// of 64 columns by cp.async, three steps ahead, 16-byte chunks XOR-swizzled by row so that ldmatrix meets no conflict.
// Shared memory: 4 x (8 + 8) KiB. Alignment: columns % 8 == 0, x rows on 16 bytes.
// Registers: 3 CTAs of 128 threads per SM by shared memory, hence at most 168. Architectures: sm_80 and up.
// Source: Chen et al., arXiv:2310.18547 (Punica's SGMV).
#include "lora_prefill.cuh"

constexpr int kThreads = 128;
constexpr int kTokens = 64;
constexpr int kBlockRows = 64;
constexpr int kChunk = 1024;
constexpr int kStep = 64;
constexpr int kSteps = kChunk / kStep;
constexpr int kStages = 4;
constexpr int kVecs = kStep / 8;  // 16-byte vectors of a row of a step

struct Params {
    LoraTables lora;
    const elem* x;  // [tokens, columns]
    float* h;       // [planes][tokens][h_stride]
    i64 h_plane;
    int h_stride;
    int columns;
    int num_planes;
    int reserved;
};
static_assert(sizeof(Params) == 96, "params.py mirrors it");

struct Shared {
    u16 x[kStages][kTokens * kStep];
    u16 a[kStages][kBlockRows * kStep];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "lora_prefill.py asks for it");

__device__ __forceinline__ int swizzled(int row, int vec) { return (row * kVecs + (vec ^ (row & 7))) * 8; }

// Starts the copy of one step: columns [column, column + 64) of the item's tokens and rank rows; a tile of A never ends
// inside a step. Always commits a group, so that groups count steps.
__device__ __forceinline__ void load_step(const Params& p, const Segment& item, const OpEntry& e, int first_row, int rows,
                                          int column, bool live, u16* x, u16* a) {
    if (live) {
        const int vec = threadIdx.x % kVecs, k = column + vec * 8;
        const int tile = column / e.a_step, start = tile * e.a_step, width = min(e.a_step, p.columns - start);
        const elem* weights = reinterpret_cast<const elem*>(p.lora.pool + p.lora.tiles[e.a_first + tile]) + k - start;
#pragma unroll
        for (int row = threadIdx.x / kVecs; row < kTokens; row += kThreads / kVecs) {
            const bool inside = row < item.count && k < p.columns;
            const i64 token = item.token_begin + (inside ? row : 0);
            copy_async16(x + swizzled(row, vec), p.x + token * p.columns + (inside ? k : 0), inside);
        }
        const int padded = (rows + 15) / 16 * 16;
        for (int row = threadIdx.x / kVecs; row < padded; row += kThreads / kVecs) {
            const bool inside = row < rows && k < p.columns;
            const elem* from = weights + static_cast<i64>(first_row + row) * width;
            copy_async16(a + swizzled(row, vec), inside ? from : p.x, inside);
        }
    }
    copy_async_commit();
}

extern "C" __global__ void __launch_bounds__(kThreads, 3) lora_prefill_shrink(const Params p) {
    LORAPLEX_SHARED(Shared, shared);
    allow_dependents();
    dependency_wait();
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
    const int first_item = p.lora.range[0], num_items = p.lora.range[1];
    for (int i = blockIdx.x; i < num_items; i += gridDim.x) {
        const Segment item = segments(p.lora)[first_item + i];
        const OpEntry& e = p.lora.entries[item.adapter * p.lora.entry_stride];
        const int first_row = item.part / p.num_planes * kBlockRows, plane = item.part % p.num_planes;
        if (first_row >= e.stacked_rank) continue;  // this layer's rank is below the adapter's largest
        const int rows = min(kBlockRows, e.stacked_rank - first_row), pairs = (rows + 15) / 16;
        const int begin = plane * kChunk, steps = min(kSteps, (p.columns - begin + kStep - 1) / kStep);
        float d[kBlockRows / 8][4] = {};
        __syncthreads();  // the buffers are free again
        for (int s = 0; s < kStages - 1; ++s)
            load_step(p, item, e, first_row, rows, begin + s * kStep, s < steps, shared.x[s], shared.a[s]);
        for (int s = 0; s < steps; ++s) {
            copy_async_wait<kStages - 2>();
            __syncthreads();  // step s has landed, and step s - 1 is done with by all
            const int ahead = s + kStages - 1, slot = ahead % kStages;
            load_step(p, item, e, first_row, rows, begin + ahead * kStep, ahead < steps, shared.x[slot], shared.a[slot]);
            const u16 *x = shared.x[s % kStages], *a = shared.a[s % kStages];
#pragma unroll
            for (int k = 0; k < kStep / 16; ++k) {
                u32 t[4];
                ldmatrix_x4(t, x + swizzled(warp * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
                for (int n = 0; n < kBlockRows / 16; ++n) {
                    if (n >= pairs) break;
                    u32 b[4];
                    ldmatrix_x4(b, a + swizzled(n * 16 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
                    mma_bf16(d[2 * n], t[0], t[1], t[2], t[3], b[0], b[1]);
                    mma_bf16(d[2 * n + 1], t[0], t[1], t[2], t[3], b[2], b[3]);
                }
            }
        }
        const int token = item.token_begin + warp * 16 + g;
        float* h = p.h + plane * p.h_plane + static_cast<i64>(token) * p.h_stride + first_row + 2 * c;
#pragma unroll
        for (int n = 0; n < kBlockRows / 8; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const bool live = warp * 16 + g + j / 2 * 8 < item.count && n * 8 + 2 * c + j % 2 < rows;
                if (live) h[static_cast<i64>(j / 2) * 8 * p.h_stride + n * 8 + j % 2] = d[n][j];
            }
    }
}
