// Shared vocabulary of all kernels: element types, 16-byte vectors, warp and block sums, mma.sync, dependent launch.
//
// No CUDA header is needed: NVRTC's built-ins and a little PTX suffice, so compiling takes milliseconds and no include
// path. LORAPLEX_HOST compiles the same source with g++ for the host shim of tests/kernels.
// Macros set by the launchers: LORAPLEX_FP32 (element type float; else bf16), LORAPLEX_PDL (dependent launch).
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

constexpr int kWarp = 32;
constexpr u32 kFullMask = 0xffffffffu;

struct alignas(2) bf16 {
    u16 bits;
};

#ifdef LORAPLEX_FP32
using elem = float;
#else
using elem = bf16;
#endif

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __uint_as_float(static_cast<u32>(v.bits) << 16); }
__device__ __forceinline__ float low_float(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_float(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ float negative_infinity() { return __uint_as_float(0xff800000u); }

// Rounds to nearest even, as torch does.
__device__ __forceinline__ u16 bf16_bits(float v) {
#ifdef LORAPLEX_HOST
    u32 bits = __float_as_uint(v);
    if (v != v) return 0x7fff;
    return static_cast<u16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#else
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
#endif
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
#ifdef LORAPLEX_HOST
    return bf16_bits(low) | static_cast<u32>(bf16_bits(high)) << 16;
#else
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
}

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
    return v;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
    return bf16{bf16_bits(v)};
}

// Rounds to the element type and back: where torch would have stored an intermediate.
__device__ __forceinline__ float rounded(float v) { return to_float(from_float<elem>(v)); }

// A kernel's shared memory as one struct: dynamic, since it may exceed 48 KiB. On 1024 bytes, as wgmma wants its tiles.
#ifdef LORAPLEX_HOST
#define LORAPLEX_SHARED(Type, name) Type& name = shim::shared_memory<Type>()
#else
#define LORAPLEX_SHARED(Type, name)                      \
    extern __shared__ __align__(1024) u8 name##_bytes[]; \
    Type& name = *reinterpret_cast<Type*>(name##_bytes)
#endif

// 16 bytes of elements: the widest access of one thread.
constexpr int kVec = 16 / static_cast<int>(sizeof(elem));
struct alignas(16) Vec {
    elem v[kVec];
};
__device__ __forceinline__ Vec load_vec(const elem* from) { return *reinterpret_cast<const Vec*>(from); }
__device__ __forceinline__ void store_vec(elem* to, const Vec& value) { *reinterpret_cast<Vec*>(to) = value; }

struct alignas(16) Quad {
    u32 x, y, z, w;
};
struct alignas(8) Pair {
    u32 x, y;
};

// Weights are read once: keep them out of L1, and let the read-only path reorder them freely (nothing writes them while
// a step that names their adapter is in flight). A warp's loads are 64 bytes of each of eight rows: the L2 fetches the 64 beside them.
__device__ __forceinline__ Quad load_weights16(const u8* from) {
#ifdef LORAPLEX_HOST
    return *reinterpret_cast<const Quad*>(from);
#else
    Quad q;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w)
                 : "l"(from));
    return q;
#endif
}
// For data that is read again only after hundreds of megabytes of weights: the load asks the L2 to keep it. The load
// keeps its order and is never moved behind a branch: loads that do not depend on each other share a trip.
#ifdef LORAPLEX_HOST
__device__ __forceinline__ Quad load_lasting16(const void* from) { return *reinterpret_cast<const Quad*>(from); }
__device__ __forceinline__ i64 load_lasting8(const void* from) { return *reinterpret_cast<const i64*>(from); }
__device__ __forceinline__ u32 load_lasting4(const void* from) { return *reinterpret_cast<const u32*>(from); }
__device__ __forceinline__ void prefetch_lasting(const void*) {}
#else
__device__ __forceinline__ u64 lasting() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ Quad load_lasting16(const void* from) {
    Quad q;
    asm volatile("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w)
                 : "l"(from), "l"(lasting()));
    return q;
}
__device__ __forceinline__ i64 load_lasting8(const void* from) {
    i64 v;
    asm volatile("ld.global.L2::cache_hint.s64 %0, [%1], %2;" : "=l"(v) : "l"(from), "l"(lasting()));
    return v;
}
__device__ __forceinline__ u32 load_lasting4(const void* from) {
    u32 v;
    asm volatile("ld.global.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(v) : "l"(from), "l"(lasting()));
    return v;
}
// Prefetches 32 bytes to the L2.
__device__ __forceinline__ void prefetch_lasting(const void* from) {
    asm volatile("prefetch.global.L2::evict_last [%0];" ::"l"(from));
}
#endif
// A pointer that was stored in shared memory: the compiler must be told that it points to global memory, or it reads
// through it as through a pointer to any kind of memory, which is slower.
template <class T>
__device__ __forceinline__ T* as_global(T* p) {
#ifndef LORAPLEX_HOST
    __builtin_assume(__isGlobal(p));
#endif
    return p;
}
// A race between CTAs or warps may show once in a million steps. Built with LORAPLEX_JITTER (tests do), a kernel makes
// it common: at its start and after each wait, one warp in 128 idles for up to 20 us, another one each time.
__device__ __forceinline__ void jitter() {
#ifdef LORAPLEX_JITTER
    const u32 begin = static_cast<u32>(clock());
    u32 hash = (begin ^ blockIdx.x * 2654435761u ^ blockIdx.y * 97u ^ threadIdx.x / kWarp * 40503u) * 0x9E3779B1u;
    hash = (hash ^ hash >> 15) * 0x85EBCA6Bu;
    hash ^= hash >> 13;
    const u32 cycles = hash % 128 == 0 ? hash >> 8 & 0x7fff : 0;
    while (static_cast<u32>(clock()) - begin < cycles) {}
#endif
}
// Programmatic dependent launch: code after dependency_wait() sees everything that earlier kernels wrote; a read before
// it must not depend on an earlier kernel (weights, tables, items).
__device__ __forceinline__ void dependency_wait() {
#ifdef LORAPLEX_PDL
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    jitter();
}
__device__ __forceinline__ void allow_dependents() {
#ifdef LORAPLEX_PDL
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    jitter();
}

// Brings data that is read later into L1 without holding a register until then.
__device__ __forceinline__ void prefetch_to_l1(const void* from) {
#ifndef LORAPLEX_HOST
    asm volatile("prefetch.global.L1 [%0];" ::"l"(from));
#endif
}

// threadIdx.x % kWarp, but read anew at each use: values computed from it are not kept in registers in between.
__device__ __forceinline__ int lane_id() {
#ifdef LORAPLEX_HOST
    return threadIdx.x % kWarp;
#else
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    __builtin_assume(lane >= 0 && lane < kWarp);  // divisions by powers of two are shifts
    return lane;
#endif
}

// Keeps the compiler from moving memory accesses across: it would start all loads first and run out of registers.
__device__ __forceinline__ void in_order() { asm volatile("" ::: "memory"); }

// Sum over a warp; the butterfly's order is fixed, and every lane gets the same bits.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v += __shfl_xor_sync(kFullMask, v, mask);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v = fmaxf(v, __shfl_xor_sync(kFullMask, v, mask));
    return v;
}

// Sum over a block of whole warps in warp order; scratch holds one float per warp. Ends with a barrier after the reads.
template <int kThreads>
__device__ __forceinline__ float block_sum(float v, float* scratch) {
    constexpr int kWarps = kThreads / kWarp;
    v = warp_sum(v);
    if constexpr (kWarps == 1) return v;
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = v;
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += scratch[w];
    __syncthreads();
    return total;
}

#ifndef LORAPLEX_HOST
// d[16][8] += a[16][16] * b[16][8], bf16 in, fp32 out. Lane l holds, with g = l / 4 and c = l % 4:
// a0 (g, 2c..), a1 (g + 8, 2c..), a2 (g, 2c + 8..), a3 (g + 8, 2c + 8..); b0 (2c.., g), b1 (2c + 8.., g);
// d0, d1 (g, 2c..), d2, d3 (g + 8, 2c..). PTX ISA, "Matrix fragments for mma.m16n8k16".
__device__ __forceinline__ void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ float exp2_approx(float v) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}
__device__ __forceinline__ float reciprocal_approx(float v) {
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}
// Transposes an 8x8 matrix of 16-bit elements held as mma fragments.
__device__ __forceinline__ u32 transpose_8x8(u32 fragment) {
    u32 out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(fragment));
    return out;
}
__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
// Four 8x8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}
__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}
// Copies 16 bytes to shared memory, or zeroes them: size 0 reads nothing.
__device__ __forceinline__ void copy_async16(void* to, const void* from, bool live) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(live ? 16 : 0));
}
// An address in shared memory as its instructions take it: it needs no register and no instruction for the kind of
// memory.
using SharedAddress = u32;
__device__ __forceinline__ SharedAddress address_of(const void* p) { return shared_address(p); }
// Copies 16 bytes to shared memory, and 256 around them to L2; or zeroes them, if bytes is 0; or does nothing.
__device__ __forceinline__ void copy_async16_if(SharedAddress to, const void* from, u32 bytes, bool live) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;}" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(static_cast<u32>(live)));
}
__device__ __forceinline__ void load_matrices(u32 (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
}
__device__ __forceinline__ Quad load_shared16(SharedAddress from) {
    Quad q;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w) : "r"(from));
    return q;
}
// The same of 4 bytes.
__device__ __forceinline__ void copy_async4(void* to, const void* from, bool live) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(live ? 4 : 0));
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;"); }
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending));
}
#endif
