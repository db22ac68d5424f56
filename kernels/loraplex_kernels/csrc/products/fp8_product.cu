// y[row, output] = (y[row, output] +) sum over inputs of x[row, input] * W[output, input], times scales, (+ bias): weights in e4m3
// or, with DENSE, in bf16 and without scales, for few rows, 128 at most, where a product takes as long as its weights take to be read.
//
// The weight is the side of 64, and rows the other one, of wgmma.m64nN: a step with 8 rows computes 8, not 64. A cluster
// makes WARPGROUPS * 64 outputs of all rows; its CTAs share the inputs in equal runs of 128 bytes, and then add their sums, in order,
// through distributed shared memory. The last warp of a CTA fills a ring of STAGES steps, the tensor memory
// accelerator copying; each other warpgroup multiplies 64 outputs and each PARTS-th step. With dependent launch the ring fills with weights while the
// kernel before this one still computes x.
// A row's result depends on its own numbers, on the weight, on CLUSTER and PARTS alone: neither on other rows nor on ROWS.
// Scales: of each row and each output, applied at the end; or, with GROUPS, of each 128 inputs of a row and each 128 x 128
// numbers of the weight, applied to each step's sums.
// With GATED the weight is an MLP's gate over its up, and y what silu_mul.cu would make of the product: a CTA has as many outputs of
// one as of the other, rounds both as if they were written, and never writes them. Without GROUPS and DENSE it says what the largest of
// its results is in each row, so that whoever quantises rows need not look first.
// Alignment: bytes of a row's inputs % 16 == 0, outputs % 8 == 0; x's and W's rows on 16 bytes, scales of a group on 16.
// Shared memory: STAGES * (WARPGROUPS * 64 + ROWS) * 128 bytes, and some more; the sums at the end lie in the ring.
// Registers: CTAS CTAs of WARPGROUPS * PARTS * 128 + 32 threads per SM: at 128 rows, a CTA of 288, hence at most 168.
// Architectures: sm_90a.
// Measured on one H200, Llama-3-8B, weights not in L2, a copy at 4.2 TB/s: at 64 rows qkv 8.8, o 8.2, gate_up 32.9 and down
// 17.7 us (2.9, 2.0, 3.6 and 3.3 TB/s of weights), at 8 rows 7.6, 6.6, 30.4 and 15.9 (docs/adr/0046-fp8-products-of-few-rows.md).
// Sources: silu_mul.cu; swapped operands as in CUTLASS's and DeepGEMM's kernels of small M.
#include "products/fp8_results.cuh"

// Where in the ring a step lies; the parity of a slot's turn.
struct Slot {
    u32 index = 0, parity = 0;
    __device__ __forceinline__ void advance(u32 steps) {
        index += steps;
        if (index >= kStages) index -= kStages, parity ^= 1;
    }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LORAPLEX_HOST)

__device__ __forceinline__ u32 step_bytes(const Params& p) { return kStageBytes + (kBlocks ? p.x_scale_stride * 4 : 0); }

__device__ __forceinline__ void copy_x(const Params& p, Shared& shared, u32 slot, u32 step) {
    const SharedAddress landed = address_of(&shared.full[slot]);
    copy_box(address_of(shared.ring[slot]) + kWeightBytes, p.x, step * kStep, 0, landed, lasting());
    if constexpr (kBlocks) {
        const i64 first = static_cast<i64>(step) * p.x_scale_stride;
        copy_bytes(address_of(shared.x_scales[slot]), p.x_scales + first, p.x_scale_stride * 4, landed);
    }
}
__device__ __forceinline__ void copy_weight(const Params& p, const Share& share, Shared& shared, u32 slot, u32 step) {
    const SharedAddress landed = address_of(&shared.full[slot]);
    arrive_expecting(landed, step_bytes(p));
#pragma unroll
    for (u32 side = 0; side < kSides; ++side)
        copy_box(address_of(shared.ring[slot]) + side * kColumns * kStep, p.weight, step * kStep,
                 share.first_column + side * p.outputs, landed, read_once());
}

// One thread's work: all copies. Weights, which no kernel writes, do not wait for the kernel before.
__device__ __forceinline__ void fill_ring(const Params& p, const Share& share, Shared& shared) {
    const u32 ahead = min(share.last, share.first + kStages);
    for (u32 step = share.first; step < ahead; ++step) copy_weight(p, share, shared, step - share.first, step);
    dependency_wait();
    for (u32 step = share.first; step < ahead; ++step) copy_x(p, shared, step - share.first, step);
    Slot slot;
    for (u32 step = ahead; step < share.last; ++step) {
        await(address_of(&shared.empty[slot.index]), slot.parity);
        copy_weight(p, share, shared, slot.index, step);
        copy_x(p, shared, slot.index, step);
        slot.advance(1);
    }
}

// A weight's scale of each step, of the block that a warpgroup's outputs lie in: a lane holds one of 32 steps.
struct BlockScales {
    const float* of_step;
    u32 last;
    float held;
    __device__ __forceinline__ float at(u32 step, u32 first) {
        const u32 lane = (step - first) % kWarp;
        if (lane < kParts) held = of_step[min(step - lane + threadIdx.x % kWarp, last - 1)];
        return __shfl_sync(kFullMask, held, lane);
    }
};
__device__ __forceinline__ BlockScales block_scales(const Params& p, const Share& share, u32 group) {
    const u32 block = weight_row(p, share, group * 64) / kStep;
    return {p.weight_scales + static_cast<i64>(block) * p.steps, share.last, 0.f};
}

using Sums = float[kRows / 8][4];

__device__ __forceinline__ void add_products(Sums& sums, u32 pass, const float (&d)[kTiles][4], const float* x_scales,
                                             float scale) {
    const u32 c = threadIdx.x % 4;
#pragma unroll
    for (u32 n = 0; n < kTiles; ++n) {
        float (&sum)[4] = sums[pass * kTiles + n];
        if constexpr (kBlocks) {
            const float* of_rows = x_scales + pass * kPass + 8 * n + 2 * c;
            const float low = of_rows[0] * scale, high = of_rows[1] * scale;
            sum[0] += d[n][0] * low, sum[1] += d[n][1] * high, sum[2] += d[n][2] * low, sum[3] += d[n][3] * high;
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] += d[n][i];
        }
    }
}

// A warpgroup's work: the products of its 64 outputs, of each kParts-th step.
__device__ __forceinline__ void multiply_steps(const Params& p, const Share& share, Shared& shared, Sums& sums) {
    const u32 warpgroup = __shfl_sync(kFullMask, threadIdx.x / 128, 0), group = warpgroup % kGroups, part = warpgroup / kGroups;
    BlockScales scales = block_scales(p, share, group);
    Slot slot;
    slot.advance(part);
    for (u32 step = share.first + part; step < share.last; step += kParts) {
        const float scale = kBlocks ? scales.at(step, share.first) : 1.f;
        await(address_of(&shared.full[slot.index]), slot.parity);
        const SharedAddress at = address_of(shared.ring[slot.index]);
        const u64 weight = descriptor(at + group * 64 * kStep);
#pragma unroll
        for (u32 pass = 0; pass < kRows / kPass; ++pass) {
            float d[kTiles][4];
            multiply(d, weight, descriptor(at + kWeightBytes + pass * kPass * kStep));
            add_products(sums, pass, d, shared.x_scales[slot.index], scale);
        }
        if (threadIdx.x % kWarp == 0) arrive(address_of(&shared.empty[slot.index]));
        slot.advance(kParts);
    }
}

// Factors that are applied at the end: requested at the start, so that none is waited for.
__device__ __forceinline__ void load_factors(const Params& p, const Share& share, Shared& shared) {
    for (u32 i = threadIdx.x; i < kOutputs; i += kMultipliers) {
        const u32 output = weight_row(p, share, i);
        shared.output_scales[i] = kBlocks || !kScaled ? 1.f : p.weight_scales[output];
        shared.bias[i] = p.bias == nullptr ? 0.f : to_float(p.bias[output]);
    }
    dependency_wait();
    for (u32 row = threadIdx.x; row < kRows; row += kMultipliers)
        shared.row_scales[row] = kBlocks || !kScaled || row >= p.rows ? 1.f : p.x_scales[row];
}

__device__ __forceinline__ void store_sums(const Sums& sums, Shared& shared) {
    const u32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, part = warp / (4 * kGroups);
    const u32 output = warp % (4 * kGroups) * 16 + lane / 4, row = 2 * (lane % 4);
#pragma unroll
    for (u32 n = 0; n < kRows / 8; ++n) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) shared.sums[part][8 * n + row + i % 2][output + i / 2 * 8] = sums[n][i];
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1)
    __launch_bounds__(kThreads, CTAS) fp8_product(const __grid_constant__ Params p) {
    LORAPLEX_SHARED(Shared, shared);
    const Share share = share_of(p);
    allow_dependents();
    const bool copies = threadIdx.x >= kMultipliers, leads = threadIdx.x == kMultipliers;
    if (leads) {
        for (u32 slot = 0; slot < kStages; ++slot) {
            init_barrier(address_of(&shared.full[slot]), 1);
            init_barrier(address_of(&shared.empty[slot]), kGroups * 4);  // warps of one part
        }
        reveal_barriers();
    }
    __syncthreads();
    Sums sums = {};
    if (copies) {
        if (leads) fill_ring(p, share, shared);
        __syncwarp();
    } else {
        load_factors(p, share, shared);
        multiply_steps(p, share, shared, sums);
    }
    __syncthreads();  // the ring is through: its last copies were read
    if (!copies) store_sums(sums, shared);
    cluster_release<kCluster>();
    cluster_acquire<kCluster>();
    Results results = {};
    read_sums(p, share, shared, results);
    cluster_release<kCluster>();
    write_results(p, share, shared, results);
    if constexpr (kCluster > 1) cluster_acquire<kCluster>();  // until then others read this CTA's memory
}

#endif
