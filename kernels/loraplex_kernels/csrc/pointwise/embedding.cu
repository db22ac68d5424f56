// out[t] = table[ids[t]]; an id outside the vocabulary gives a row of zeros rather than a fault.
//
// ids[t] == -1 means: the token last sampled for slot slots[t], still on the device (StepPlan's FROM_DEVICE); below, that
// lora/embed_rows.cu has written the row, as the token's adapter adapts the embedding. With SCALED every row is multiplied, those
// too.
// Grid: one CTA per token. Block: 128 threads copying 16-byte vectors. No shared memory. Alignment: rows on 16 bytes.
// Registers: 16 CTAs per SM, hence at most 32. Architectures: sm_80 and up.
#include "common.cuh"

constexpr int kHidden = HIDDEN;
static_assert(kHidden % kVec == 0, "rows are copied as 16-byte vectors");

struct Params {
    const elem* table;        // [vocab, HIDDEN]
    const int* ids;           // [tokens]
    const int* slots;         // [tokens]; read only where ids[t] < 0
    const int* last_sampled;  // [slots]
    elem* out;                // [tokens, HIDDEN]
    int vocab;
    float multiplier;  // with SCALED only
};
static_assert(sizeof(Params) == 48, "params.py mirrors it");

extern "C" __global__ void __launch_bounds__(128, 16) embedding(const Params p) {
    allow_dependents();
    dependency_wait();
    const int token = blockIdx.x;
    int id = p.ids[token];
#ifdef SCALED
    const bool is_written = id < -1;
    if (id == -1) id = p.last_sampled[p.slots[token]];
#else
    if (id < -1) return;
    if (id < 0) id = p.last_sampled[p.slots[token]];
#endif
    const bool known = id >= 0 && id < p.vocab;
    for (int column = threadIdx.x * kVec; column < kHidden; column += 128 * kVec) {
        Vec row = {};
        if (known) row = load_vec(p.table + static_cast<i64>(id) * kHidden + column);
#ifdef SCALED
        if (is_written) row = load_vec(p.out + static_cast<i64>(token) * kHidden + column);
#pragma unroll
        for (int j = 0; j < kVec; ++j) row.v[j] = from_float<elem>(to_float(row.v[j]) * p.multiplier);
#endif
        store_vec(p.out + static_cast<i64>(token) * kHidden + column, row);
    }
}
