// out[first + r] = A_r * x[row]: the inputs of FLoRA's passes over a slice of W, for rows whose adapter has FLoRA there. What the
// other rows' passes hold stays as it is, and is read by nothing.
//
// Grid: (ceil(columns / (256 * 16 bytes)), rows with FLoRA). Block: 256 threads, one 16-byte vector of all passes each. No shared
// memory. Alignment: columns % (16 / sizeof(elem)) == 0. Registers: 6 CTAs per SM, hence at most 40. Architectures: sm_80 and up.
#include "lora/flora.cuh"

struct Params {
    PartTables tables;          // its adapters are not read: rows name theirs
    const FloraEntry* entries;  // [adapters][layers][ops], already advanced to this layer and op
    const FloraRow* rows;       // [grid.y]
    const elem* x;              // [tokens, columns]
    elem* out;                  // [passes, columns]
    int columns;
    int slice;
};
static_assert(sizeof(Params) == 72, "params.py mirrors it");

extern "C" __global__ void __launch_bounds__(256, 6) lora_flora_scale(const Params p) {
    allow_dependents();
    const int column = (blockIdx.x * 256 + threadIdx.x) * kVec;
    const Quad row = load_lasting16(p.rows + blockIdx.y);
    const FloraEntry* e = p.entries + static_cast<int>(row.y) * p.tables.entry_stride;
    const Factors a = load_factors(e, p.slice, e->a_first, e->a_step, e->a_offset, p.columns);
    dependency_wait();  // also a CTA without work: its grid must not complete before the one it depends on
    if (a.rank == 0 || column >= p.columns) return;
    const FactorColumn factors = factor_column(p.tables, a, column);
    const Vec x = load_vec(p.x + static_cast<i64>(static_cast<int>(row.x)) * p.columns + column);
    elem* to = p.out + static_cast<i64>(static_cast<int>(row.z)) * p.columns + column;
#pragma unroll 1
    for (int r = 0; r < a.rank; ++r, to += p.columns) {
        const Numbers numbers = read_numbers(factors.from + static_cast<i64>(r) * factors.stride);
        Vec scaled;
#pragma unroll
        for (int j = 0; j < kVec; ++j) scaled.v[j] = from_float<elem>(numbers.v[j] * to_float(x.v[j]));
        store_vec(to, scaled);
    }
}
