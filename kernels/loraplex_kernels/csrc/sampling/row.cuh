// How one row draws, and its logits after constraints and penalties: computed anew whenever they are read, so that no
// copy of the vocabulary is written. Order: mask, allowed ids, bias, banned stops; repetition, frequency, presence
// penalty.
#pragma once
#include "common.cuh"

constexpr int kUnit = 8;  // tokens that are read together: one byte of the bitmap, two Philox blocks

struct alignas(16) SampleRow {
    int slot;
    float temperature;  // 0: greedy
    int top_k;          // 0: all
    float top_p;        // 1: all
    float min_p;
    float repetition, presence, frequency;
    u32 seed_low, seed_high;
    int position;
    int num_top;     // -1: no probabilities; else report the drawn token's and so many likeliest
    int is_banning;  // stop ids cannot be drawn
    int edit_row;    // of edits and their bitmap; -1: none
    int num_edits;   // negative: -n edits, and tokens without one cannot be drawn
    int count_row;   // of counts; -1: no penalties
    int mask_row;    // of masks; -1: every token may be drawn
    int reserved[3];
};
static_assert(sizeof(SampleRow) == 80, "sample.py mirrors it");

struct Edit {
    int token;  // rising within a row
    float bias;
    u32 flags;
};
static_assert(sizeof(Edit) == 12, "sample.py mirrors it");
constexpr u32 kNotAllowed = 1, kStop = 2;  // Edit.flags

constexpr u16 kInPrompt = 0x8000;  // counts: bit 15: in the prompt; the rest: how often in the output, at most 32767
constexpr u16 kMostCounted = 0x7fff;
constexpr float kMaxLogit = 0x1.fffffep127f;  // the largest float

// Tokens of one row.
struct Source {
    const elem* logits;
    const u8* mask;  // a bit per token, set if it may be drawn (words are little-endian); null: all may
    const u8* bits;  // a bit per token that has an edit; null: none
    const Edit* edits;
    u16* counts;  // null: no penalties
    int vocab;
    int num_edits;
    bool only_edited;
    bool is_special;  // has edits or counts
};

struct alignas(16) Unit {
    elem v[kUnit];
};

// Units lie on 16 bytes where the vocabulary is whole units.
__device__ __forceinline__ Unit load_unit(const elem* logits, int base, int vocab) {
    if (vocab % kUnit == 0) return *reinterpret_cast<const Unit*>(logits + base);
    Unit unit = {};
#pragma unroll
    for (int j = 0; j < kUnit; ++j)
        if (base + j < vocab) unit.v[j] = logits[base + j];
    return unit;
}

__device__ __forceinline__ float edited(const Source& s, bool is_banning, float x, int token) {
    int low = 0, high = s.num_edits - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (as_global(s.edits)[middle].token < token) low = middle + 1;
        else high = middle;
    }
    const Edit edit = as_global(s.edits)[low];
    if (edit.flags & kNotAllowed) x = negative_infinity();
    x = __fadd_rn(x, edit.bias);
    return is_banning && (edit.flags & kStop) ? negative_infinity() : x;
}

// The logit of a token in a row with edits or counts. Each product is rounded before it is subtracted, as torch does.
__device__ __forceinline__ float special_logit(const Source& s, const SampleRow& row, float x, int token) {
    if (s.bits) {
        if (as_global(s.bits)[token / kUnit] >> (token % kUnit) & 1) x = edited(s, row.is_banning, x, token);
        else if (s.only_edited) x = negative_infinity();
    }
    if (!s.counts) return x;
    const u32 count = as_global(s.counts)[token];
    // A tiny penalty makes a likely token certain, never infinite: an infinite logit would leave no valid draw.
    if (row.repetition != 1.f && count)
        x = x > 0.f && x <= kMaxLogit ? fminf(__fdiv_rn(x, row.repetition), kMaxLogit) : __fmul_rn(x, row.repetition);
    if (const u32 drawn = count & kMostCounted) {
        x = __fsub_rn(x, __fmul_rn(static_cast<float>(drawn), row.frequency));
        x = __fsub_rn(x, row.presence);
    }
    return x;
}
