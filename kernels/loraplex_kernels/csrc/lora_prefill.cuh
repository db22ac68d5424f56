// Work items of LoRA at prefill; prefill_items.py fills them.
#pragma once
#include "lora_table.cuh"

// One CTA's share of a run of tokens of one adapter; what part counts is each kernel's.
struct alignas(16) Segment {
    int token_begin;
    int count;  // <= 64
    int adapter;
    int part;
};

__device__ __forceinline__ const Segment* segments(const LoraTables& t) {
    return reinterpret_cast<const Segment*>(t.items);
}
