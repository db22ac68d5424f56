// y = c * (y - base_bias) + base_bias + scale * b over rows with an adapter, after their product and pairs; rows, and outputs,
// without c and b stay as they are. c that scales the base's bias too: y = c * y + scale * b.
//
// Grid: (ceil(width / (256 * 16 bytes)), rows). Block: 256 threads, one 16-byte vector each. No shared memory.
// Alignment: slices begin on 16 bytes. Registers: 6 CTAs per SM, hence at most 40. Architectures: sm_80 and up.
#include "lora/finish.cuh"

struct Params {
    PartTables tables;
    const VectorEntry* scales;  // [adapters][layers][ops], already advanced to this layer and op
    const VectorEntry* biases;  // the same
    elem* y;                    // [rows, width]
    const float* scale;         // [rows]; the request's factor on b
    const elem* base_bias;      // [width], in y already; or null
    int slice_begin[kSlices + 1];
    int width;
    int reserved;
};
static_assert(sizeof(Params) == 96, "params.py mirrors it");

extern "C" __global__ void __launch_bounds__(256, 6) lora_finish(const Params p) {
    allow_dependents();
    const int column = (blockIdx.x * 256 + threadIdx.x) * kVec;
    const i64 row = blockIdx.y;
    const int adapter = p.tables.adapters[row];
    SliceVector c = {}, b = {};
    int at = 0;
    if (adapter >= 0 && column < p.width) {
        const int slice = (column >= p.slice_begin[1]) + (column >= p.slice_begin[2]);
        const i64 entry = adapter * p.tables.entry_stride;
        at = column - p.slice_begin[slice];
        c = load_slice(p.scales + entry, slice);
        b = load_slice(p.biases + entry, slice);
    }
    const Finish finish = load_finish(p.tables, c, b, at);
    dependency_wait();  // also a CTA without work: its grid must not complete before the one it depends on
    if (c.step == 0 && b.step == 0) return;
    elem* to = p.y + row * p.width + column;
    const elem* bias = p.base_bias == nullptr ? nullptr : p.base_bias + column;
    store_vec(to, finished(load_vec(to), finish, c, bias, p.scale[row]));
}
