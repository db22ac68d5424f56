// y[row] = sum over r of B_r * products[first + r] + bias in one slice of an op, for rows whose adapter has FLoRA there: it takes
// the place of the base's product. Other rows stay as they are.
//
// Grid: (ceil(outputs / (256 * 16 bytes)), rows with FLoRA). Block: 256 threads, one 16-byte vector each. No shared memory.
// Alignment: slices begin on 16 bytes. Registers: 6 CTAs per SM, hence at most 40. Architectures: sm_80 and up.
#include "lora/flora.cuh"

struct Params {
    PartTables tables;          // its adapters are not read: rows name theirs
    const FloraEntry* entries;  // [adapters][layers][ops], already advanced to this layer and op
    const FloraRow* rows;       // [grid.y]
    const elem* products;       // [passes, outputs]
    const elem* bias;           // [outputs]; the base's; or null
    elem* y;                    // [tokens, width], already advanced to the slice
    int outputs;
    int width;
    int slice;
    int reserved;
};
static_assert(sizeof(Params) == 88, "params.py mirrors it");

extern "C" __global__ void __launch_bounds__(256, 6) lora_flora_sum(const Params p) {
    allow_dependents();
    const int output = (blockIdx.x * 256 + threadIdx.x) * kVec;
    const Quad row = load_lasting16(p.rows + blockIdx.y);
    const FloraEntry* e = p.entries + static_cast<int>(row.y) * p.tables.entry_stride;
    const Factors b = load_factors(e, p.slice, e->b_first, e->b_step, e->b_offset, p.outputs);
    dependency_wait();  // also a CTA without work: its grid must not complete before the one it depends on
    if (b.rank == 0 || output >= p.outputs) return;
    const FactorColumn factors = factor_column(p.tables, b, output);
    const elem* from = p.products + static_cast<i64>(static_cast<int>(row.z)) * p.outputs + output;
    float sums[kVec] = {};
#pragma unroll 1
    for (int r = 0; r < b.rank; ++r, from += p.outputs) {
        const Numbers numbers = read_numbers(factors.from + static_cast<i64>(r) * factors.stride);
        const Vec product = load_vec(from);
#pragma unroll
        for (int j = 0; j < kVec; ++j) sums[j] = fmaf(numbers.v[j], to_float(product.v[j]), sums[j]);
    }
    Vec bias = {}, y;
    if (p.bias != nullptr) bias = load_vec(p.bias + output);
#pragma unroll
    for (int j = 0; j < kVec; ++j) y.v[j] = from_float<elem>(sums[j] + to_float(bias.v[j]));
    store_vec(p.y + static_cast<i64>(static_cast<int>(row.x)) * p.width + output, y);
}
