// The two products of lora/prefill.cu on tensor cores, made by 8 warps: x * A^T of a step, and h * B^T of a chunk.
//
// sm_90a above rank 16: wgmma.m64nNk16 reads both operands from shared memory, once per warpgroup, by one instruction per
// 16 columns. Elsewhere mma.m16n8k16, with fragments that ldmatrix reads once per warp: at rank 64 twice the bytes, and 28
// instructions of a warp instead of 4; at rank 16, where a warp has one tile a step, 2..5 % faster on an H100 all the same.
// A warp's accumulators of wgmma are those of mma.m16n8k16 side by side, so a tile's sums lie in the same lanes both ways.
// Alignment: operands on 1024 bytes, rows of 128 or of 16 << lg bytes, their 16-byte vectors XOR-swizzled by the hardware's
// rule: swizzled() is its 128-byte mode, Loader::b_to its 128-, 64- and 32-byte mode.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions" and "Async proxy".
#pragma once
#include "lora/prefill_ring.cuh"

// Which part of both products a warp makes: tokens from 16 m, and half n of a block's rank rows or of a chunk's outputs.
struct Warp {
    u32 m, n, lane;
};
// Tiles of 8 rank rows of a block whose sums a warp hands on.
struct Tiles {
    u32 first, count;
};

constexpr u32 kHalfTiles = kRanks / 16;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && RANKS > 16

constexpr bool kWarpgroups = true;  // a warp without tokens has to join in the products of the other three
static_assert(kActivationBytes % 1024 == 0 && kSlotBytes % 1024 == 0 && sizeof(Shared::partial) % 1024 == 0,
              "so that all of wgmma's operands, hidden among them, start where the swizzle does");

// n by way of a shuffle: the compiler then knows it to be uniform, and makes descriptors in uniform registers.
__device__ __forceinline__ Warp this_warp() {
    const u32 warp = threadIdx.x / kWarp;
    return {warp % kWarpsM, __shfl_sync(kFullMask, warp / kWarpsM, 0), threadIdx.x % kWarp};
}
// Sums past a block's last rank row are made all the same, of whatever lies there: wgmma's N is part of the instruction.
__device__ __forceinline__ Tiles tiles_of(const Warp& warp, u32 columns) {
    const u32 first = warp.n * kHalfTiles;
    return {first, min(kHalfTiles, max(columns / 8, first) - first)};
}

// Of rows of 16 << lg bytes: 8 rows' bytes / 16, and the mode, of which 1 is 128 bytes, 2 is 64, 3 is 32.
__device__ __forceinline__ u32 descriptor_high(u32 lg) { return 8 << lg | (4 - lg) << 30; }
__device__ __forceinline__ u64 descriptor(SharedAddress tile, u32 high) {
    return static_cast<u64>(high) << 32 | (tile >> 4 & 0x3fff);
}
constexpr u64 kNextColumns = 2;  // 16 elements / 16 bytes: the swizzle is of addresses, so this stays right within a row

// d[64 tokens][N] += a[64 tokens][16] * b[N][16]^T.
__device__ __forceinline__ void wgmma(float (&d)[2][4], u64 a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, "
        "%8, %9, 1, 1, 1, 0, 0;"
        : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3])
        : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma(float (&d)[4][4], u64 a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, 1, 1, 1, 0, 0;"
        : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),
          "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),
          "+f"(d[3][2]), "+f"(d[3][3])
        : "l"(a), "l"(b));
}

// Keeps the instructions that make d before this, and those that read it behind.
template <int kTiles>
__device__ __forceinline__ void pin(float (&d)[kTiles][4]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3]));
}
// d += a * b^T over `columns`, 16 * kMost at most; d is ready behind it. Each number of columns has a basic block of its own
// from wgmma.fence to the wait: with a branch between them, ptxas serializes all wgmma of the kernel (C7514 in its log).
template <u32 kMost, int kTiles>
__device__ __forceinline__ void multiply(float (&d)[kTiles][4], u64 a, u64 b, u32 columns) {
    if constexpr (kMost > 1) {
        if (columns < kMost * 16) return multiply<kMost - 1>(d, a, b, columns);
    }
    pin(d);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (u32 k = 0; k < kMost; ++k) wgmma(d, a + k * kNextColumns, b + k * kNextColumns);
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
    pin(d);
}
__device__ __forceinline__ void multiply_step(float (&d)[kHalfTiles][4], const Warp& warp, const Tiles&, SharedAddress x,
                                              SharedAddress a) {
    const u32 high = descriptor_high(3);
    multiply<kStep / 16>(d, descriptor(x, high), descriptor(a + warp.n * (kRanks / 2 * 128), high), kStep);
}
__device__ __forceinline__ void multiply_chunk(float (&d)[4][4], const Warp& warp, SharedAddress hidden, SharedAddress b,
                                               u32 lg, u32 columns) {
    const u64 outputs = descriptor(b + (warp.n * 32 << (lg + 4)), descriptor_high(lg));
    multiply<kRanks / 16>(d, descriptor(hidden, descriptor_high(3)), outputs, columns);
}
// wgmma reads through the async proxy: what a thread wrote, and cp.async on its behalf, others' wgmma see once the thread
// has called this and met them at a barrier. What wgmma has read may be overwritten after its wait and a barrier.
__device__ __forceinline__ void reveal() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#else

constexpr bool kWarpgroups = false;

__device__ __forceinline__ Warp this_warp() {
    return {threadIdx.x / kWarp / kWarpsN, threadIdx.x / kWarp % kWarpsN, threadIdx.x % kWarp};
}
__device__ __forceinline__ Tiles tiles_of(const Warp& warp, u32 columns) {
    if constexpr (kRanks == 16) return {warp.n, 1};
    const u32 first = (columns / 16 + 1) / 2 * 2;  // pairs stay together
    return warp.n == 0 ? Tiles{0, first} : Tiles{first, columns / 8 - first};
}

__device__ __forceinline__ void multiply_step(float (&d)[kHalfTiles][4], const Warp& warp, const Tiles& tiles, SharedAddress x,
                                              SharedAddress a) {
#pragma unroll
    for (int k = 0; k < kStep / 8; k += 4) {
        u32 t[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            load_matrices(t[i], x + swizzled(warp.m * 16 + warp.lane % 16, k + 2 * i + warp.lane / 16));
        }
#pragma unroll
        for (u32 n = 0; n < kHalfTiles; ++n) {
            if (n >= tiles.count) break;
            u32 b[4];
            load_matrices(b, a + swizzled((tiles.first + n) * 8 + warp.lane % 8, k + warp.lane / 8));
            mma_bf16(d[n], t[0][0], t[0][1], t[0][2], t[0][3], b[0], b[1]);
            mma_bf16(d[n], t[1][0], t[1][1], t[1][2], t[1][3], b[2], b[3]);
        }
    }
}
__device__ __forceinline__ void multiply_chunk(float (&d)[4][4], const Warp& warp, SharedAddress hidden, SharedAddress b,
                                               u32 lg, u32 columns) {
    const u32 lane = warp.lane, swizzle = ((lane & 7) >> (3 - lg)) & ((1 << lg) - 1);
    const SharedAddress first = b + ((warp.n * 32 + lane / 16 * 8 + lane % 8) << (lg + 4));
#pragma unroll
    for (u32 k = 0; k < kRanks / 16; ++k) {
        if (k * 16 >= columns) break;
        u32 t[4];
        load_matrices(t, hidden + swizzled(warp.m * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // 16 outputs
            u32 w[4];
            load_matrices(w, first + (i << (lg + 8)) + ((2 * k + lane / 8 % 2) ^ swizzle) * 16);
            mma_bf16(d[2 * i], t[0], t[1], t[2], t[3], w[0], w[1]);
            mma_bf16(d[2 * i + 1], t[0], t[1], t[2], t[3], w[2], w[3]);
        }
    }
}
__device__ __forceinline__ void reveal() {}

#endif
