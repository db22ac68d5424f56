// h[plane][t] = x[t, chunk] * A[:, chunk]^T for the tokens of an adapter, all slices of an op stacked: the first half of
// LoRA at decode. Plane i holds the share of columns [i * 1024, (i + 1) * 1024); whoever reads h sums planes in order,
// so no atomics, no memset, and a token's result does not depend on its batch.
//
// Work item: (group of <= 8 tokens, 16 rank rows, 1024 columns) = 32 KiB of bf16 weights whatever the rank; begin = first
// rank row / 16, extent = plane. Grid: any; CTAs stride over the items. Block: 8 warps; warp w takes 128 columns.
// bf16: mma.m16n8k16 with rank rows as M and tokens as N; both operands go from global memory straight into fragments
// (a lane's 16 bytes are 8 columns of one row: the order of k inside a product is free), 8 loads in flight per lane.
// fp32: the same mapping with scalar FMAs. Shared memory: 4 KiB. Alignment: columns % 8 == 0, x rows on 16 bytes.
// Registers: 4 CTAs of 256 threads per SM, hence at most 64. Architectures: sm_80 and up.
// Sources: Chen et al., arXiv:2310.18547 (Punica); Sheng et al., arXiv:2311.03285 (S-LoRA).
#include "lora_table.cuh"

constexpr int kWarps = 8;
constexpr int kRows = 16;
constexpr int kChunk = 1024;
constexpr int kWarpColumns = kChunk / kWarps;
constexpr int kSteps = kWarpColumns / 32;  // 32 columns: 4 lanes x 16 bytes of bf16

struct Params {
    LoraTables lora;
    const elem* x;  // [tokens, columns]
    float* h;       // [planes][tokens][h_stride]
    i64 h_plane;    // floats from one plane to the next
    int h_stride;
    int columns;
};
static_assert(sizeof(Params) == 88, "lora.py mirrors it");

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

// Products of this lane's rows g and g + 8 with tokens 2c and 2c + 1, over the warp's columns.
__device__ __forceinline__ void warp_product(const Params& p, const OpEntry& e, const Group& group, int row, int column,
                                             float (&d)[4]) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
    const bool upper = row + g < e.stacked_rank, lower = row + g + 8 < e.stacked_rank;
#ifdef LORAPLEX_FP32
    float sums[2][kGroupTokens] = {};
    dependency_wait();
#pragma unroll 1
    for (int s = 0; s < kSteps; ++s) {
        const int k = column + s * 32 + c * 8;
        if (k >= p.columns) break;
        Fragment a0 = {}, a1 = {};
        if (upper) a0 = load_fragment(a_address(p.lora, e, row + g, k, p.columns));
        if (lower) a1 = load_fragment(a_address(p.lora, e, row + g + 8, k, p.columns));
#pragma unroll
        for (int t = 0; t < kGroupTokens; ++t) {
            if (t >= group.count) continue;
            const float* x = p.x + static_cast<i64>(group.tokens[t]) * p.columns + k;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                sums[0][t] += a0.v[j] * x[j];
                sums[1][t] += a1.v[j] * x[j];
            }
        }
    }
#pragma unroll
    for (int t = 0; t < kGroupTokens; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float v = sums[half][t];
            v += __shfl_xor_sync(kFullMask, v, 1);
            v += __shfl_xor_sync(kFullMask, v, 2);
            if (t / 2 == c) d[half * 2 + t % 2] = v;
        }
    }
#else
    Quad a0[kSteps], a1[kSteps], x[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; s += 2) {  // tiles end on multiples of 64 columns
        const int k = column + s * 32;
        a0[s] = a1[s] = a0[s + 1] = a1[s + 1] = Quad{};
        if (k + c * 8 < p.columns && upper) {
            const int tile = k / e.a_step, start = tile * e.a_step, width = min(e.a_step, p.columns - start);
            const u8* from = p.lora.pool + p.lora.tiles[e.a_first + tile] + ((row + g) * width + k - start + c * 8) * 2;
            const bool more = k + c * 8 + 32 < p.columns;
            a0[s] = load_weights16(from);
            if (more) a0[s + 1] = load_weights16(from + 64);
            if (lower) a1[s] = load_weights16(from + width * 16);
            if (lower && more) a1[s + 1] = load_weights16(from + width * 16 + 64);
        }
    }
    dependency_wait();
    const elem* from = p.x + static_cast<i64>(group.tokens[g]) * p.columns + column + c * 8;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        x[s] = Quad{};
        if (g < group.count && column + s * 32 + c * 8 < p.columns) x[s] = *reinterpret_cast<const Quad*>(from + s * 32);
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        mma_bf16(d, a0[s].x, a1[s].x, a0[s].y, a1[s].y, x[s].x, x[s].y);
        mma_bf16(d, a0[s].z, a1[s].z, a0[s].w, a1[s].w, x[s].z, x[s].w);
    }
#endif
}

extern "C" __global__ void __launch_bounds__(kWarps * kWarp, 4) lora_shrink(const Params p) {
    __shared__ float partial[kWarps][kRows][kGroupTokens];
    allow_dependents();
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
    const int num_items = p.lora.range[1];
    for (int i = blockIdx.x; i < num_items; i += gridDim.x) {
        const Work work = fetch_work(p.lora, i);
        const Item& item = work.item;
        const OpEntry& e = *work.entry;
        const Group& group = p.lora.groups[item.group];
        const int row = item.begin * kRows;
        if (row >= e.stacked_rank) continue;  // this layer's rank is below the adapter's largest
        float d[4] = {};
        warp_product(p, e, group, row, item.extent * kChunk + warp * kWarpColumns, d);
        partial[warp][g][2 * c] = d[0];
        partial[warp][g][2 * c + 1] = d[1];
        partial[warp][g + 8][2 * c] = d[2];
        partial[warp][g + 8][2 * c + 1] = d[3];
        __syncthreads();
        const int r = threadIdx.x % kRows, t = threadIdx.x / kRows;
        if (t < group.count && row + r < e.stacked_rank) {
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum += partial[w][r][t];
            p.h[item.extent * p.h_plane + static_cast<i64>(group.tokens[t]) * p.h_stride + row + r] = sum;
        }
        __syncthreads();
    }
    dependency_wait();  // a CTA without items must not let its grid complete before the one it depends on
}
