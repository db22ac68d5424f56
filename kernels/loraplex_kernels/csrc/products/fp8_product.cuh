// Sizes, parameters and shared memory of fp8_product.cu; which part of the result is a CTA's.
#pragma once
#ifdef GATED
#include "pointwise/silu.cuh"
#endif
#include "products/fp8_wgmma.cuh"

constexpr u32 kGroups = WARPGROUPS;
constexpr u32 kOutputs = kGroups * 64;  // rows of the weight
#ifdef GATED
constexpr u32 kSides = 2;
#else
constexpr u32 kSides = 1;
#endif
constexpr u32 kColumns = kOutputs / kSides;  // of y
static_assert(kColumns % 64 == 0, "a warpgroup's outputs are of one side");
constexpr u32 kParts = PARTS;
constexpr u32 kCluster = CLUSTER;
constexpr u32 kStages = STAGES;
constexpr u32 kMultipliers = kGroups * kParts * 128;  // threads; the warp behind them copies
constexpr u32 kThreads = kMultipliers + kWarp;
constexpr u32 kWeightBytes = kOutputs * kStep, kStageBytes = kWeightBytes + kRows * kStep;
constexpr u32 kSumStride = kOutputs + 4;  // a quarter warp's sums lie in 32 banks
#ifdef GROUPS
constexpr bool kBlocks = true;
#else
constexpr bool kBlocks = false;
#endif
#ifdef DENSE
constexpr bool kScaled = false;
static_assert(!kBlocks, "numbers in bf16 have no scales");
#else
constexpr bool kScaled = true;
#endif
static_assert(kCluster >= 1 && kCluster <= 8, "larger clusters need an attribute");
// Copies land in any order, and a parity tells a slot's turn only from the next: who awaits a turn must have seen the one before.
static_assert(kParts >= 1 && kParts <= 4 && kStages % kParts == 0, "a slot is always the same part's");

struct Params {
    TensorMap weight;            // e4m3 or bf16 [kSides * outputs, inputs] in boxes of kColumns x 128 bytes
    TensorMap x;                 // e4m3 or bf16 [rows, inputs] in boxes of ROWS x 128 bytes
    const float* weight_scales;  // [kSides * outputs]; with GROUPS [ceil(kSides * outputs / 128), steps]; not with DENSE
    const float* x_scales;       // [rows]; with GROUPS [steps, x_scale_stride]; not with DENSE
    const elem* bias;            // [kSides * outputs]; or null
    elem* y;                     // [rows, outputs]
    int rows, outputs;
    int steps;           // ceil(bytes of a row's inputs / 128)
    int x_scale_stride;  // a multiple of 4, at most ROWS
    int accumulates;     // whether y is added to; not with GATED
    int reserved;
    float* maxima;  // [rows, ceil(outputs / kColumns)]: largest absolute values of y; with GATED, and not with GROUPS or DENSE
};
static_assert(sizeof(Params) == 320, "fp8_params.py mirrors it");

struct Shared {
    union {
        u8 ring[kStages][kStageBytes];
        float sums[kParts][kRows][kSumStride];  // of this CTA's inputs, once the ring is through
    };
    float x_scales[kStages][kRows];
    float row_scales[kRows], output_scales[kOutputs], bias[kOutputs];
    u64 full[kStages], empty[kStages];
};
static_assert(kStageBytes % 1024 == 0, "so that all of wgmma's operands start where the swizzle does");

// A CTA's share of its cluster's columns of y: steps [first, last).
struct Share {
    u32 first_column, rank, first, last;
};
__device__ __forceinline__ Share share_of(const Params& p) {
    const u32 rank = blockIdx.x % kCluster, steps = p.steps;
    return {blockIdx.x / kCluster * kColumns, rank, steps * rank / kCluster, steps * (rank + 1) / kCluster};
}

// The weight's row that is the index-th of a CTA, or its last one.
__device__ __forceinline__ u32 weight_row(const Params& p, const Share& share, u32 index) {
    const u32 outputs = p.outputs, row = share.first_column + index % kColumns + index / kColumns * outputs;
    return min(row, kSides * outputs - 1);
}
