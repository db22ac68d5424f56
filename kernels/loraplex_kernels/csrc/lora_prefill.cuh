// Work items of LoRA at prefill (lora_prefill.py fills them) and what clusters of CTAs need.
#pragma once
#include "lora_table.cuh"

// A cluster's work: a run of tokens of one adapter, one slice, and a share of the slice's outputs.
struct alignas(16) Segment {
    int token_begin;
    int count;    // <= kTokens
    int adapter;
    int part;     // slice + 4 * share
};

__device__ __forceinline__ const Segment* segments(const LoraTables& t) {
    return reinterpret_cast<const Segment*>(t.items);
}

// The compile-time cluster size: launches need no attribute.
#if defined(CLUSTER) && CLUSTER > 1
#define LORAPLEX_CLUSTER __cluster_dims__(CLUSTER, 1, 1)
#else
#define LORAPLEX_CLUSTER
#endif

// Clusters of one CTA need none of their instructions, so that sm_80 runs the same kernels. Predicates are part of the
// instructions here: the branches that the compiler would make cost more than what they guard.
#ifndef LORAPLEX_HOST
using SharedAddress = u32;
__device__ __forceinline__ SharedAddress address_of(const void* p) { return shared_address(p); }
template <class Shared>
__device__ __forceinline__ u8* generic_address(Shared& shared, SharedAddress at) {
    return reinterpret_cast<u8*>(&shared) + (at - shared_address(&shared));
}
// Copies 16 bytes to shared memory, and 256 around them to L2; or zeroes them, if bytes is 0; or does nothing.
__device__ __forceinline__ void copy_async16_if(SharedAddress to, const void* from, u32 bytes, bool live) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;}"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(static_cast<u32>(live)));
}
__device__ __forceinline__ void load_matrices(u32 (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row));
}
__device__ __forceinline__ Quad load_shared16(SharedAddress from) {
    Quad q;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w) : "r"(from));
    return q;
}
__device__ __forceinline__ void store_global16_if(void* to, const Quad& q, bool live) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.v4.u32 [%0], {%1, %2, %3, %4};}"
                 ::"l"(to), "r"(q.x), "r"(q.y), "r"(q.z), "r"(q.w), "r"(static_cast<u32>(live)));
}
template <u32 kCluster>
__device__ __forceinline__ u32 cluster_rank() {
    if constexpr (kCluster == 1) return 0;
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
template <u32 kCluster>
__device__ __forceinline__ void cluster_arrive() {
    if constexpr (kCluster > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
template <u32 kCluster>
__device__ __forceinline__ void cluster_wait() {
    if constexpr (kCluster > 1) {
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    } else {
        __syncthreads();
    }
}
// Stores 8 bytes to where `to` is in the shared memory of another CTA of the cluster.
template <u32 kCluster>
__device__ __forceinline__ void store_peer(SharedAddress to, u32 cta, const Pair& value) {
    if constexpr (kCluster == 1) {
        asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(value.x), "r"(value.y) : "memory");
    } else {
        u32 address;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(to), "r"(cta));
        asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(value.x), "r"(value.y) : "memory");
    }
}
#endif
