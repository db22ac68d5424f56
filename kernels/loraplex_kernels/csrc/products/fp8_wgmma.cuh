// sums[64 outputs][ROWS] += W[64][inputs] * x[ROWS][inputs]^T by one warpgroup, on tensor cores: of 128 inputs in e4m3 or, with
// DENSE, 64 in bf16.
//
// Tensor cores sum e4m3 products with about 14 bits: after 128 inputs what they have is added to a sum in fp32, times the
// scales of blocks where there are such. Up to 64 rows at a time, so that these registers stay few.
// A lane holds, with g = lane / 4, c = lane % 4 and warp w of the warpgroup: sums[n][0, 1] of output 16 w + g and rows
// 8 n + 2 c, + 1; sums[n][2, 3] of output 16 w + g + 8.
// Operands: rows of 128 bytes, swizzled by the hardware's 128-byte rule, on 1024 bytes.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"; DeepSeek-V3, arXiv:2412.19437, section 3.3.
#pragma once
#include "products/tma.cuh"

constexpr int kRows = ROWS;
constexpr int kPass = kRows < 64 ? kRows : 64;  // rows of one instruction
constexpr int kTiles = kPass / 8;
static_assert(kRows == 8 || kRows == 16 || kRows == 32 || kRows % 64 == 0, "the numbers of rows that have an instruction");

constexpr u32 kStep = 128;      // a row's bytes in a step
constexpr u64 kNextInputs = 2;  // 32 bytes / 16 bytes: the swizzle is of addresses, so this stays right within a row

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Of rows of 128 bytes: 1024 bytes / 16 to the next 8 rows, and mode 1, the swizzle of 128 bytes.
__device__ __forceinline__ u64 descriptor(SharedAddress tile) {
    return static_cast<u64>(64u | 1u << 30) << 32 | (tile >> 4 & 0x3fff);
}

#ifdef DENSE
#define LORAPLEX_WGMMA(rows) "wgmma.mma_async.sync.aligned.m64n" rows "k16.f32.bf16.bf16 "
#define LORAPLEX_AS_THEY_LIE ", 1, 1, 1, 0, 0;"
#else
#define LORAPLEX_WGMMA(rows) "wgmma.mma_async.sync.aligned.m64n" rows "k32.f32.e4m3.e4m3 "
#define LORAPLEX_AS_THEY_LIE ", 1, 1, 1;"
#endif
#define LORAPLEX_TILE(d) "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3])
__device__ __forceinline__ void wgmma(float (&d)[1][4], u64 a, u64 b) {
    asm volatile(LORAPLEX_WGMMA("8") "{%0, %1, %2, %3}, %4, %5" LORAPLEX_AS_THEY_LIE : LORAPLEX_TILE(d[0]) : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma(float (&d)[2][4], u64 a, u64 b) {
    asm volatile(LORAPLEX_WGMMA("16") "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9" LORAPLEX_AS_THEY_LIE
                 : LORAPLEX_TILE(d[0]), LORAPLEX_TILE(d[1])
                 : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma(float (&d)[4][4], u64 a, u64 b) {
    asm volatile(
        LORAPLEX_WGMMA("32") "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
        "%14, %15}, %16, %17" LORAPLEX_AS_THEY_LIE
        : LORAPLEX_TILE(d[0]), LORAPLEX_TILE(d[1]), LORAPLEX_TILE(d[2]), LORAPLEX_TILE(d[3])
        : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma(float (&d)[8][4], u64 a, u64 b) {
    asm volatile(
        LORAPLEX_WGMMA("64") "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
        "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33" LORAPLEX_AS_THEY_LIE
        : LORAPLEX_TILE(d[0]), LORAPLEX_TILE(d[1]), LORAPLEX_TILE(d[2]), LORAPLEX_TILE(d[3]), LORAPLEX_TILE(d[4]),
          LORAPLEX_TILE(d[5]), LORAPLEX_TILE(d[6]), LORAPLEX_TILE(d[7])
        : "l"(a), "l"(b));
}
// Keeps the instructions that make d before this, and those that read it behind.
__device__ __forceinline__ void pin(float (&d)[kTiles][4]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) asm volatile("" : LORAPLEX_TILE(d[n]));
}
#undef LORAPLEX_TILE
#undef LORAPLEX_AS_THEY_LIE
#undef LORAPLEX_WGMMA

// A step's products of one pass of rows, in one basic block from wgmma.fence to the wait.
__device__ __forceinline__ void multiply(float (&d)[kTiles][4], u64 weight, u64 x) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) d[n][0] = d[n][1] = d[n][2] = d[n][3] = 0.f;
    pin(d);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (u32 k = 0; k < kStep / 32; ++k) wgmma(d, weight + k * kNextInputs, x + k * kNextInputs);
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
    pin(d);
}
#endif
