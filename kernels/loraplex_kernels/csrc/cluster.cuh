// What clusters of CTAs need: how one CTA stores to another, and waits for what others store to it.
//
// sm_90 and up; clusters of one CTA, sm_80 and up. Source: PTX ISA, "st.async" and "barrier.cluster".
#pragma once
#include "common.cuh"

// The compile-time cluster size: launches need no attribute.
#if defined(CLUSTER) && CLUSTER > 1
#define LORAPLEX_CLUSTER __cluster_dims__(CLUSTER, 1, 1)
#else
#define LORAPLEX_CLUSTER
#endif

// Clusters of one CTA need none of their instructions, so that sm_80 runs the same kernels.
#ifndef LORAPLEX_HOST
template <u32 kCluster>
__device__ __forceinline__ u32 cluster_rank() {
    if constexpr (kCluster == 1) return 0;
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// CTAs of a cluster hand data over by asynchronous stores, which count their bytes at an mbarrier of the receiver, who waits
// for these bytes alone. A cluster barrier waits for all CTAs, and its release for all that is on its way (MEMBAR.ALL.GPU).
// One thread expects what will come, once per mbarrier: with a single phase, its parity 0, no thread can miss its end.
template <u32 kCluster>
__device__ __forceinline__ void expect_bytes(SharedAddress landed, u32 bytes) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nmbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(landed),
                 "r"(bytes)
                 : "memory");
}
// Between a thread's expect_bytes and its cluster_arrive.
__device__ __forceinline__ void reveal_expected() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// That this CTA runs, and expects what it does: peers may store to it. Relaxed: it hands over nothing else.
template <u32 kCluster>
__device__ __forceinline__ void cluster_arrive() {
    if constexpr (kCluster > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
template <u32 kCluster>
__device__ __forceinline__ void cluster_wait() {
    if constexpr (kCluster > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Waits until all that was expected is here; in a cluster of one, until its threads have stored it.
template <u32 kCluster>
__device__ __forceinline__ void await_bytes(SharedAddress landed) {
    if constexpr (kCluster == 1) return __syncthreads();
    asm volatile(
        "{.reg .pred p;\n"
        "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], 0;\n"
        "@!p bra again;}" ::"r"(landed)
        : "memory");
}
// Stores 8 or 16 bytes to where `to` is in the shared memory of a CTA of the cluster; they count at its `landed`.
template <u32 kCluster>
__device__ __forceinline__ void store_peer(SharedAddress to, SharedAddress landed, u32 cta, const Pair& value) {
    if constexpr (kCluster == 1) {
        asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(value.x), "r"(value.y) : "memory");
    } else {
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(to), "r"(cta));
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(landed) : "r"(landed), "r"(cta));
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%2, %3}, [%1];" ::"r"(to),
                     "r"(landed), "r"(value.x), "r"(value.y)
                     : "memory");
    }
}
template <u32 kCluster>
__device__ __forceinline__ void store_peer(SharedAddress to, SharedAddress landed, u32 cta, const Quad& value) {
    if constexpr (kCluster == 1) {
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z),
                     "r"(value.w)
                     : "memory");
    } else {
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(to), "r"(cta));
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(landed) : "r"(landed), "r"(cta));
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(to),
                     "r"(landed), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
                     : "memory");
    }
}
#endif
