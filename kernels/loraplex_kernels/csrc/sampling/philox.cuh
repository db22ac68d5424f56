// Philox4x32-10 and the Gumbel noise made of it: the integers of engine's philox.py, a pure function of (seed, output
// position, token id). Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
#pragma once
#include "common.cuh"

constexpr int kLanes = 4;  // tokens that share one counter

struct alignas(16) Words {
    u32 w[kLanes];
};

// Words of tokens 4 block .. 4 block + 3: counter (block, position, 0, 0) under key (seed low, seed high).
__device__ __forceinline__ Words philox4x32(u32 block, u32 position, u32 key0, u32 key1) {
    u32 c0 = block, c1 = position, c2 = 0, c3 = 0;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u32 high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const u32 high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ key0, c1 = low1, c2 = high0 ^ c3 ^ key1, c3 = low0;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return Words{{c0, c1, c2, c3}};
}

// u = (word + 0.5) / 2^32 rounded once to fp32: 2 word + 1 is exact in 64 bits, the scaling exact in fp32.
__device__ __forceinline__ float uniform_of(u32 word) {
    return fminf(static_cast<float>(2ull * word + 1ull) * 0x1p-33f, 1.f - 0x1p-24f);
}
// -log(E) with E = -log(1 - u); the same library calls, in the same order, as torch's on a GPU.
__device__ __forceinline__ float gumbel_of(float uniform) { return -logf(-log1pf(-uniform)); }
constexpr float kMaxGumbel = 23.f;  // the largest is 22.87, of word 0
