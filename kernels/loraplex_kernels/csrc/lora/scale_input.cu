// x = e * x where it lies, over rows whose adapter has e for this op; other rows stay as they are.
//
// Grid: (ceil(columns / (256 * 16 bytes)), rows). Block: 256 threads, one 16-byte vector each. No shared memory.
// Alignment: columns % (16 / sizeof(elem)) == 0. Registers: 8 CTAs per SM, hence at most 32. Architectures: sm_80 and up.
#include "lora/parts.cuh"

struct Params {
    PartTables tables;
    const InVectorEntry* entries;  // [adapters][layers][ops], already advanced to this layer and op
    elem* x;                       // [rows, columns]
    int columns;
    int reserved;
};
static_assert(sizeof(Params) == 56, "params.py mirrors it");

extern "C" __global__ void __launch_bounds__(256, 8) lora_scale_input(const Params p) {
    allow_dependents();
    const int column = (blockIdx.x * 256 + threadIdx.x) * kVec;
    const i64 row = blockIdx.y;
    const int adapter = p.tables.adapters[row];
    Quad entry = {};
    if (adapter >= 0 && column < p.columns) entry = load_lasting16(p.entries + adapter * p.tables.entry_stride);
    const int step = static_cast<int>(entry.y);
    Numbers factors = {};
    if (step != 0) {
        const i64 offset = static_cast<i64>(static_cast<u64>(entry.w) << 32 | entry.z);
        factors = load_numbers(p.tables, static_cast<int>(entry.x), step, offset, column);
    }
    dependency_wait();  // also a CTA without work: its grid must not complete before the one it depends on
    if (step == 0) return;
    elem* to = p.x + row * p.columns + column;
    Vec x = load_vec(to);
#pragma unroll
    for (int j = 0; j < kVec; ++j) x.v[j] = from_float<elem>(factors.v[j] * to_float(x.v[j]));
    store_vec(to, x);
}
