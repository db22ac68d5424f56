// The embedding of tokens whose adapter adapts it: out[t] = values[i] where the adapter replaces row ids[t], else table[ids[t]]; and
// h[t] = A[:, ids[t]] of a pair, which lora/expand.cu multiplies with B. Runs before pointwise/embedding.cu, which leaves a
// token alone once its id stands as -2 - id: that says "done" to it, and to a further pass of this kernel, which only writes h.
//
// A row that the adapter replaces gets no delta: h is 0. A token that its adapter leaves alone is left to the other kernel. An id outside the vocabulary that the adapter has no row of
// gives zeros, as there. Column id of A lies in one tile, a rank row after the other: 32 bytes are fetched for each, a
// hundredth of what B takes.
// Grid: one CTA per token. Block: 128 threads: each looks at one of 128 tokens of the adapter, at equal distances, in each
// round of the search, three rounds for a whole vocabulary; then they copy 16-byte vectors. No shared memory. Alignment: rows
// on 16 bytes. Registers: 8 CTAs per SM, hence at most 64. Architectures: sm_80 and up.
#include "lora/token_rows.cuh"

constexpr int kThreads = 128;
constexpr int kHidden = HIDDEN;
static_assert(kHidden % kVec == 0, "rows are copied as 16-byte vectors");

struct Params {
    LoraTables lora;          // entries: the embedding's pairs
    const RowsEntry* rows;    // [adapters][ops], already advanced to the embedding
    const int* tokens;        // [CTAs] numbers in the step, each once
    const int* adapters;      // [CTAs] their adapters
    int* ids;                 // [tokens]; below 0: see embedding.cu
    const int* slots;         // [tokens]
    const int* last_sampled;  // [slots]
    const elem* table;        // [vocab, HIDDEN]
    elem* out;                // [tokens, HIDDEN]
    float* h;                 // [tokens, h_stride]
    int h_stride;
    int vocab;
};
static_assert(sizeof(Params) == 136, "row_params.py mirrors it");

// Number of the row that stands for a token, or -1; every thread of the block calls it.
__device__ __forceinline__ int find_row(const LoraTables& t, const Rows& rows, int id) {
    int begin = 0, end = id <= rows.last_id ? rows.count : 0;
#pragma unroll 1
    while (begin < end) {  // the row is in [begin, end), if there is one
        const int step = (end - begin + kThreads - 1) / kThreads, at = begin + static_cast<int>(threadIdx.x) * step;
        const int reached = __syncthreads_count(at < end && token_at(t, rows, at) <= id);
        if (reached == 0) return -1;
        begin += (reached - 1) * step;
        if (step == 1) return token_at(t, rows, begin) == id ? begin : -1;
        end = min(end, begin + step);
    }
    return -1;
}

__device__ __forceinline__ void copy_row(const Params& p, const Rows& rows, int row, int id, elem* out) {
    const elem* from = nullptr;
    if (row >= 0) from = reinterpret_cast<const elem*>(values_at(p.lora, rows, row, kHidden));
    else if (id < p.vocab) from = p.table + static_cast<i64>(id) * kHidden;
    for (int column = threadIdx.x * kVec; column < kHidden; column += kThreads * kVec) {
        Vec values = {};
        if (from != nullptr) values = load_vec(as_global(from) + column);
        store_vec(out + column, values);
    }
}

// Zeros unless `has_delta`.
__device__ __forceinline__ void copy_column(const Params& p, const AEntry& a, int id, bool has_delta, float* h) {
    const u8* from = has_delta && id < p.vocab ? a_address(p.lora, a, 0, id, p.vocab) : nullptr;
    const int width = min(a.a_step, p.vocab - id / a.a_step * a.a_step);
    for (int k = threadIdx.x; k < a.stacked_rank; k += kThreads)
        h[k] = from != nullptr ? to_float(reinterpret_cast<const elem*>(as_global(from))[static_cast<i64>(k) * width]) : 0.f;
}

extern "C" __global__ void __launch_bounds__(kThreads, 8) embed_rows(const Params p) {
    allow_dependents();
    const int token = p.tokens[blockIdx.x], adapter = p.adapters[blockIdx.x];
    const Rows rows = load_rows_entry(p.rows + adapter * p.lora.entry_stride);
    const AEntry a = load_a_entry(p.lora, adapter);
    dependency_wait();
    const int given = p.ids[token];
    const bool is_done = given < -1;
    const int id = is_done ? -2 - given : given == -1 ? p.last_sampled[p.slots[token]] : given;
    if (id < 0) return;
    const int row = is_done ? -1 : find_row(p.lora, rows, id);
    if (!is_done && row < 0 && a.stacked_rank == 0) return;
    __syncthreads();  // every thread has read the id
    if (threadIdx.x == 0) p.ids[token] = -2 - id;
    if (!is_done) copy_row(p, rows, row, id, p.out + static_cast<i64>(token) * kHidden);
    if (a.stacked_rank > 0) copy_column(p, a, id, row < 0, p.h + static_cast<i64>(token) * p.h_stride);
}
