// Tensor maps, the copies that follow them into a ring of shared memory, and mbarriers: how weights reach a product of few rows.
//
// A copy is started by one thread and counts its bytes at an mbarrier, so a ring takes no registers and as many bytes are on
// their way as there is shared memory. Rows of 128 bytes land swizzled as wgmma reads them; what lies outside of the tensor
// is zeros, and counts too. sm_90 and up.
// Source: PTX ISA, "cp.async.bulk.tensor" and "mbarrier".
#pragma once
#include "common.cuh"

// What cuTensorMapEncodeTiled made. A kernel takes it by value, as a __grid_constant__: copies want its address.
struct alignas(64) TensorMap {
    u64 words[16];
};
static_assert(sizeof(TensorMap) == 128, "params.py mirrors it");

#ifndef LORAPLEX_HOST
__device__ __forceinline__ void init_barrier(SharedAddress barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Behind a thread's init_barrier: its copies may count there.
__device__ __forceinline__ void reveal_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void arrive(SharedAddress barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_expecting(SharedAddress barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void await(SharedAddress barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (done == 0);
}

__device__ __forceinline__ u64 read_once() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
// Copies the map's box that begins at (column, row).
__device__ __forceinline__ void copy_box(SharedAddress to, const TensorMap& map, u32 column, u32 row, SharedAddress landed,
                                         u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(landed), "l"(policy)
        : "memory");
}
// Copies a multiple of 16 bytes from and to addresses on 16.
__device__ __forceinline__ void copy_bytes(SharedAddress to, const void* from, u32 bytes, SharedAddress landed) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(landed)
                 : "memory");
}

// What the threads of a cluster wrote to shared memory before they all have called cluster_release, they all see behind
// cluster_acquire; what they read of it was read. A cluster of one CTA needs none of the cluster's instructions.
template <u32 kCluster>
__device__ __forceinline__ void cluster_release() {
    if constexpr (kCluster == 1) return;
    __syncwarp();  // `aligned` is of whole warps, and lanes may come from different branches
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
template <u32 kCluster>
__device__ __forceinline__ void cluster_acquire() {
    if constexpr (kCluster == 1) return __syncthreads();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// 16 bytes of what is at `from` in the shared memory of a CTA of the cluster. Not ordered with other memory: loads that do not
// depend on each other share a trip.
template <u32 kCluster>
__device__ __forceinline__ Quad load_peer(SharedAddress from, u32 cta) {
    if constexpr (kCluster == 1) return load_shared16(from);
    Quad q;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(from) : "r"(from), "r"(cta));
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w) : "r"(from));
    return q;
}
#endif
