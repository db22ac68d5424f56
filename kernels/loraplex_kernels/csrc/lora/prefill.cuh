// Work items of LoRA at prefill (lora/prefill.py fills them).
#pragma once
#include "cluster.cuh"
#include "lora/table.cuh"

// A cluster's work: a run of tokens of one adapter, one slice, and a share of the slice's outputs.
struct alignas(16) Segment {
    int token_begin;
    int count;  // <= kTokens
    int adapter;
    int part;  // slice + 4 * share; of wide ranks slice + 4 * (not the first 256 rank rows) + 8 * share
};

__device__ __forceinline__ const Segment* segments(const LoraTables& t) { return reinterpret_cast<const Segment*>(t.items); }

// Predicates are part of the instructions here: the branches that the compiler would make cost more than what they guard.
#ifndef LORAPLEX_HOST
template <class Shared>
__device__ __forceinline__ u8* generic_address(Shared& shared, SharedAddress at) {
    return reinterpret_cast<u8*>(&shared) + (at - shared_address(&shared));
}
__device__ __forceinline__ void store_global16_if(void* to, const Quad& q, bool live) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.v4.u32 [%0], {%1, %2, %3, %4};}" ::"l"(to), "r"(q.x),
                 "r"(q.y), "r"(q.z), "r"(q.w), "r"(static_cast<u32>(live)));
}
#endif
