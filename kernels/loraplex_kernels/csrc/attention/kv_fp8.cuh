// K and V as e4m3 with one scale for each token and KV head: what their bytes mean, and how the bytes are made.
//
// A page is [layer][K|V][kv_head][token][dim] of e4m3, then, KV_SCALES bytes from its start, the scales: bf16
// [layer][kv_head][token][K|V], so that one load brings both. A value is e4m3 * scale, rounded to bf16 where bf16 is computed.
// scale = bf16(largest magnitude / 448), hence no value is clipped below 448 * 127.5; not a number: so is one of the row's.
// Integer arithmetic in place of sm_89's conversions: the same bits on every architecture, and on the host.
#pragma once
#include "common.cuh"

constexpr float kFp8Most = 448.f;                      // the largest e4m3
constexpr u32 kFp8Rebias = 120u << 7;                  // 2^120 as a part of bf16's bits: e4m3's bias is 7, bf16's 127
constexpr float kMostScale = 127.5f;                   // times 2^120 is still a bf16
constexpr float kLeastScale = 7.888609052210118e-31f;  // 2^-100: its inverse is a float

// Products of two pairs of bf16.
__device__ __forceinline__ u32 multiply_bf16x2(u32 a, u32 b) {
#ifdef LORAPLEX_HOST
    return pack_bf16(low_float(a) * low_float(b), high_float(a) * high_float(b));
#else
    u32 out;  // sm_80 has no mul.bf16x2; adding -0 changes nothing
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(0x80008000u));
    return out;
#endif
}

__device__ __forceinline__ Pair load_weights8(const u8* from) {
#ifdef LORAPLEX_HOST
    return *reinterpret_cast<const Pair*>(from);
#else
    Pair p;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(p.x), "=r"(p.y) : "l"(from));
    return p;
#endif
}

// Four e4m3 (bytes 0..3) times the factor that `multiplier` (2^120 times it, in both halves) stands for: pairs of bf16 of
// bytes (0, 2) and (1, 3). The bits of an e4m3, moved to bf16's place, are its value times 2^-120, also of a subnormal.
__device__ __forceinline__ void widen4(u32 raw, u32 multiplier, u32& even, u32& odd) {
    even = multiply_bf16x2((raw << 8 & 0x80008000u) | (raw & 0x007f007fu) << 4, multiplier);
    odd = multiply_bf16x2((raw & 0x80008000u) | (raw & 0x7f007f00u) >> 4, multiplier);
}
// Bytes (0, 2, 1, 3), so that widen4 gives the pairs (0, 1) and (2, 3).
__device__ __forceinline__ u32 in_pairs(u32 raw) {
#ifdef LORAPLEX_HOST
    return raw & 0xff0000ffu | (raw & 0xff00u) << 8 | (raw & 0xff0000u) >> 8;
#else
    u32 out;
    asm("prmt.b32 %0, %1, 0, 0x3120;" : "=r"(out) : "r"(raw));
    return out;
#endif
}
__device__ __forceinline__ float fp8_float(u8 raw) {
    return __uint_as_float((raw & 0x80u) << 24 | (raw & 0x7fu) << 20) * __uint_as_float(247u << 23);  // times 2^120
}

// The multiplier of a scale, for widen4.
__device__ __forceinline__ u32 multiplier_of(u32 scale_bits) {
    const u32 bits = scale_bits >= 0x7f80u ? 0x7fffu : scale_bits + kFp8Rebias;
    return bits | bits << 16;
}

// The scale of a row, as bf16's bits, from the bits of its largest magnitude: of integers, so that one that is not a number
// is the largest.
__device__ __forceinline__ u32 scale_of(u32 most_bits) {
    if (most_bits >= 0x7f800000u) return 0x7fffu;
    return bf16_bits(fminf(fmaxf(__uint_as_float(most_bits) * (1.f / kFp8Most), kLeastScale), kMostScale));
}
__device__ __forceinline__ u32 magnitude_bits(float v) { return __float_as_uint(v) & 0x7fffffffu; }

// Rounds to the nearest e4m3, ties to even; larger magnitudes become 448.
__device__ __forceinline__ u32 fp8_bits(float v) {
    const float magnitude = fminf(fabsf(v), kFp8Most);
    const u32 sign = __float_as_uint(v) >> 24 & 0x80u, bits = __float_as_uint(magnitude);
    if (magnitude < 0.015625f)  // below 2^-6: a multiple of 2^-9, which 2^14 + v rounds to
        return sign | (__float_as_uint(magnitude + 16384.f) - __float_as_uint(16384.f));
    return sign | (((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3));
}
