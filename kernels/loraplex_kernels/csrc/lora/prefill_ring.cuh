// What a CTA of lora/prefill.cu has to do, and the ring through which all that it reads comes: x and A of each step, then y and
// B of each chunk of outputs. lora/prefill.cu says why.
#pragma once
#include "lora/prefill.cuh"

constexpr u32 kTokens = 64;
constexpr u32 kRanks = RANKS;  // most rank rows of a block: 16, 32 or 64
constexpr u32 kCluster = CLUSTER;
constexpr int kStages = STAGES;
constexpr int kMaxBlocks = BLOCKS;       // of 64 rank rows
constexpr int kTable = TABLE;            // most steps, and most chunks, of a CTA
constexpr u32 kWarpsM = 4, kWarpsN = 2;  // 16 tokens x (half the rank rows, or 32 outputs) each
constexpr u32 kThreads = kWarpsM * kWarpsN * kWarp;
constexpr u32 kStep = 64;  // columns of x, rank rows of a block, outputs of a chunk: rows of 128 bytes, 8 vectors
constexpr u32 kActivationBytes = kTokens * kStep * 2;
constexpr u32 kSlotBytes = kActivationBytes + kRanks * kStep * 2;
constexpr u32 kOwned = kTokens / kCluster;  // tokens whose h a CTA sums
constexpr u32 kParts = PARTS;  // of a step's columns, each within one tile of A: 1, or 4 or 8 where tiles are narrower
constexpr u32 kPartColumns = kStep / kParts;
// Ranks above 256, of which an item has the first 256 rows or the others, and which have 32 outputs to a tile of B.
constexpr bool kIsWide = kParts == 8;
constexpr u32 kHalfRank = 256;
constexpr u32 kBParts = kIsWide ? 2 : 1;  // of a chunk's outputs, each within one tile of B
constexpr u32 kPartOutputs = kStep / kBParts;
static_assert(kTokens == 16 * kWarpsM && kThreads == 256 && kOwned * kCluster == kTokens);
static_assert(kMaxBlocks == 1 || kRanks == kStep, "blocks but the last are full");
static_assert(kParts == 1 || kPartColumns == 16 || kIsWide, "the narrowest tiles of up to 768 stacked rank rows");

struct Params {
    LoraTables lora;
    const elem* x;       // [tokens, columns]
    const float* scale;  // [tokens]
    elem* y;             // [tokens, y_stride]
    i64 y_stride;
    int columns;
    int log_shares;
    int slice_begin[kSlices + 1];
};
static_assert(sizeof(Params) == 112, "params.py mirrors it");

struct Shared {
    u8 ring[kStages][kSlotBytes];
    float partial[kTokens * kRanks];  // [source CTA][owned token][rank row]
    u8 hidden[kMaxBlocks][kTokens * kStep * 2];
    const u8* a_base[kTable * kParts];   // of the first rank row of each part of a step
    const u8* b_base[kTable * kBParts];  // of the first output of each part of a chunk
    u32 a_stride[kTable * kParts];       // bytes
    float scale[kTokens];
    u64 partial_landed[kMaxBlocks], hidden_landed[kMaxBlocks];  // mbarriers: what peers store to `partial` and `hidden`
};
static_assert(sizeof(Shared) == SHARED_BYTES, "lora/prefill.py asks for it");

// What a CTA has to do.
struct Job {
    u32 token_begin, count;
    u32 rank, first;                         // of the slice; its first row in A
    u32 slice_begin, first_output, outputs;  // first counted from the slice's
    u32 first_step, steps;
    u32 b_stride, b_first;  // of wide ranks: elements from one row of B to the next, and those before this item's
};
// Elements from one row of B to the next.
__device__ __forceinline__ u32 row_length(const Job& job) {
    if constexpr (kIsWide) return job.b_stride;
    return job.rank;
}

// Byte offset of 16-byte vector `vec` of 128-byte row `row`.
__device__ __forceinline__ u32 swizzled(u32 row, u32 vec) { return row * 128 + (vec ^ (row & 7)) * 16; }
// Place of a column of a row of partial sums: 4 rows' 8-byte stores, or 2 rows' of 16, meet no bank conflict.
__device__ __forceinline__ u32 partial_at(u32 row, u32 column) {
    return row * kRanks + (column ^ (kRanks == 16 ? row / 2 % 2 * 8 : row % 2 * 16));
}
// Where in a slot's A a rank row goes: row 4 a + 2 t + b of 16 to the columns that lane a has of tile t, so that a pair of
// tiles holds 4 neighbouring sums of a lane. Of 16 rank rows in all a warp has but one tile, hence 2 neighbours.
__device__ __forceinline__ u32 place_of_rank(u32 row) {
    return kRanks == 16 ? row : (row & ~14u) | (row & 2) << 2 | (row >> 1 & 6);
}
__device__ __forceinline__ u32 padded(u32 rank) { return min(kStep, (rank + 15) & ~15u); }

__device__ __forceinline__ Job make_job(const Params& p, const Segment& item, const OpEntry& e, u32 cta) {
    Job job;
    const u32 slice = item.part & 3, share = item.part >> (kIsWide ? 3 : 2);
    job.token_begin = item.token_begin, job.count = item.count;
    job.rank = e.rank[slice];
    job.first = 0;
    job.slice_begin = p.slice_begin[0];
    u32 slice_end = p.slice_begin[1];
#pragma unroll
    for (u32 s = 1; s < kSlices; ++s) {  // indexed at run time, the parameters would be copied to the stack
        if (s > slice) break;
        job.first += e.rank[s - 1];
        job.slice_begin = p.slice_begin[s], slice_end = p.slice_begin[s + 1];
    }
    if constexpr (kIsWide) {
        const bool is_second = item.part >> 2 & 1;
        job.b_stride = job.rank, job.b_first = is_second ? kHalfRank : 0;
        job.first += job.b_first;
        job.rank = is_second ? max(job.rank, kHalfRank) - kHalfRank : min(job.rank, kHalfRank);
    }
    const u32 steps = (p.columns + kStep - 1) / kStep;
    job.first_step = steps * cta / kCluster;
    job.steps = steps * (cta + 1) / kCluster - job.first_step;
    const u32 all = slice_end - job.slice_begin, chunks = (all + kStep - 1) / kStep, part = share * kCluster + cta;
    job.first_output = (chunks * part / kCluster >> p.log_shares) * kStep;
    job.outputs = min(all, (chunks * (part + 1) / kCluster >> p.log_shares) * kStep) - job.first_output;
    return job;
}

__device__ __forceinline__ void look_up_tiles(const Params& p, const OpEntry& e, const Job& job, u32 slice, Shared& shared) {
    for (u32 i = threadIdx.x; i < job.steps * kParts; i += kThreads) {
        u32 column = (job.first_step * kParts + i) * kPartColumns;
        if constexpr (kParts > 1) column = min(column, p.columns - 8u);  // parts past the last column are never read
        const u32 step = e.a_step, tile = column / step, start = tile * step;
        const u32 width = min(step, p.columns - start);
        shared.a_base[i] = p.lora.pool + a_tile(p.lora, e, tile) + (job.first * width + column - start) * 2;
        shared.a_stride[i] = width * 2;
    }
    // From the other end, so that different warps wait for the two kinds of tiles.
    for (u32 i = kThreads - 1 - threadIdx.x; i / kBParts * kStep < job.outputs; i += kThreads) {
        u32 n = job.first_output + i * kPartOutputs;
        if constexpr (kIsWide) n = min(n, job.first_output + job.outputs - 1);  // a chunk's second part may be empty
        const u32 step = e.b_step[slice], tile = n / step;
        const u8* base = p.lora.pool + b_tile(p.lora, e, slice, tile) + (n - tile * step) * row_length(job) * 2;
        if constexpr (kIsWide) base += job.b_first * 2;
        shared.b_base[i] = base;
    }
}

// Fills the ring: for each block of rank rows the steps of x and A, then for each chunk of outputs y and the blocks of B.
struct Loader {
    const Params& p;
    const Job& job;
    Shared& shared;
    SharedAddress ring;
    const elem* from;  // x, then y: this thread's first row and vector
    i64 stride;        // elements to its next row
    u32 limit;         // columns or outputs
    u32 row, vec;      // of 8 vectors a row
    u32 lg;            // log2 of the vectors of a row of B
    u32 b_row, b_to, b_from;
    u32 block, at, slot = 0;  // next: rank block, and step or chunk
    bool shrinking;

    __device__ __forceinline__ Loader(const Params& p, const Job& job, Shared& shared)
        : p(p), job(job), shared(shared), ring(address_of(shared.ring)), row(threadIdx.x / 8), vec(threadIdx.x % 8) {
        lg = job.rank <= 16 ? 1 : job.rank <= 32 ? 2 : 3;
        b_row = threadIdx.x >> lg;
        const u32 b_vec = threadIdx.x & ((1 << lg) - 1);
        // Row 8 a + 2 j + b of a block of 32 goes where the mma for j reads its row 2 a + b.
        const u32 place = (b_row & ~31u) + (b_row / 2 & 3) * 8 + (b_row / 8 & 3) * 2 + (b_row & 1);
        b_to = (place << (lg + 4)) + (b_vec ^ (((place & 7) >> (3 - lg)) & ((1 << lg) - 1))) * 16;
        b_from = b_vec * 8;
        start();
    }
    __device__ __forceinline__ void start() {
        block = at = 0;
        shrinking = job.steps > 0;
        if (!shrinking) return start_expanding();
        from = p.x + static_cast<i64>(job.token_begin + row) * p.columns + job.first_step * kStep + vec * 8;
        stride = static_cast<i64>(kThreads / 8) * p.columns;
        limit = p.columns - job.first_step * kStep;
    }
    __device__ __forceinline__ void start_expanding() {
        shrinking = false;
        from = p.y + (job.token_begin + row) * p.y_stride + job.slice_begin + job.first_output + vec * 8;
        stride = kThreads / 8 * p.y_stride;
        limit = job.outputs;
    }
    __device__ __forceinline__ void load_activations(SharedAddress to) const {
        if (!shrinking && block > 0) return;
        const u32 column = at * kStep;
        const u32 bytes = column + vec * 8 < limit ? 16 : 0;
        to += swizzled(row, vec);
        copy_async16_if(to, from + column, bytes, row < job.count);
        copy_async16_if(to + kThreads * 16, from + column + stride, bytes, row + kThreads / 8 < job.count);
    }
    __device__ __forceinline__ void load_weights(SharedAddress to) const {
        to += kActivationBytes;
        if (shrinking) {
            load_a(to);
        } else {
            load_b(to);
        }
    }
    __device__ __forceinline__ void load_a(SharedAddress to) const {
        u32 part = at, within = vec;
        if constexpr (kParts > 1) part = at * kParts + vec / (8 / kParts), within = vec % (8 / kParts);
        const u32 left = job.rank - block * kStep, bytes = shared.a_stride[part];
        const bool inside = at * kStep + vec * 8 < limit;
        const u8* weights = shared.a_base[part] + ((block * kStep + row) * bytes + within * 16);
        to += swizzled(place_of_rank(row), vec);
        copy_async16_if(to, weights, inside && row < left ? 16 : 0, row < padded(left));
        if constexpr (kRanks > kThreads / 8) {
            const u32 r = row + kThreads / 8;
            copy_async16_if(to + kThreads * 16, weights + kThreads / 8 * bytes, inside && r < left ? 16 : 0, r < padded(left));
        }
    }
    // Where column `column` of B's row `r` of a chunk is.
    __device__ __forceinline__ const u8* b_address(u32 r, u32 column) const {
        if constexpr (kIsWide) {
            const u32 part = at * kBParts + min(r / kPartOutputs, kBParts - 1);
            return as_global(shared.b_base[part]) + (r % kPartOutputs * job.b_stride + column) * 2;
        }
        return as_global(shared.b_base[at]) + (r * job.rank + column) * 2;
    }
    __device__ __forceinline__ void load_b(SharedAddress to) const {
        const u32 column = block * kStep + b_from, rows = job.outputs - at * kStep;
        const bool needed = b_from < padded(job.rank - block * kStep);
        to += b_to;
        const u8* weights = b_address(b_row, column);
        if (row_length(job) % 8 != 0) {  // rows are not aligned: element by element
            u16* element = reinterpret_cast<u16*>(generic_address(shared, to));
#pragma unroll 1
            for (u32 r = b_row; needed && r < min(kStep, rows); r += kThreads >> lg) {
                if constexpr (kIsWide) weights = b_address(r, column);
#pragma unroll 1
                for (u32 j = 0; j < 8; ++j) element[j] = column + j < job.rank ? reinterpret_cast<const u16*>(weights)[j] : 0;
                element += kThreads * 8, weights += (kThreads >> lg) * job.rank * 2;
            }
            return;
        }
        const u32 bytes = column < job.rank ? 16 : 0;
        copy_async16_if(to, weights, bytes, needed && b_row < min(kStep, rows));
        if constexpr (kRanks > 32) {
            const bool second = lg == 3 && needed && b_row + kThreads / 8 < rows;
            const u8* below = kIsWide ? b_address(b_row + kThreads / 8, column) : weights + kThreads / 4 * job.rank;
            copy_async16_if(to + kThreads * 16, below, bytes, second);
        }
    }
    __device__ __forceinline__ SharedAddress next_slot() {
        const SharedAddress to = ring + slot * kSlotBytes;
        slot = slot + 1 == kStages ? 0 : slot + 1;
        return to;
    }
    __device__ __forceinline__ bool done() const { return !shrinking && at * kStep >= job.outputs; }
    __device__ __forceinline__ void advance() {
        if (shrinking) {
            if (++at < job.steps) return;
            at = 0, ++block;
            if (block * kStep < job.rank) return;
            block = 0;
            start_expanding();
        } else {
            ++block;
            if (block * kStep >= job.rank) block = 0, ++at;
        }
    }
    // Starts the loads of one slot; always commits a group, so that groups count slots.
    __device__ __forceinline__ void load() {
        const SharedAddress to = next_slot();
        if (!done()) {
            load_activations(to);
            load_weights(to);
            advance();
        }
        copy_async_commit();
    }
    // The first slots: weights before this launch may read what earlier ones wrote, activations after it.
    __device__ __forceinline__ void load_first() {
        if (job.steps < kStages - 1) return load_first_of_few_steps();
        shrinking = true, block = 0;  // tells the compiler: a slot then takes a fraction of load()'s instructions
#pragma unroll
        for (at = 0; at < kStages - 1; ++at) load_a(ring + at * kSlotBytes + kActivationBytes);
        dependency_wait();
#pragma unroll
        for (at = 0; at < kStages - 1; ++at) {
            load_activations(ring + at * kSlotBytes);
            copy_async_commit();
        }
        slot = at--;
        advance();
    }
    // Some of the first slots are the next block's, or chunks.
    __device__ __forceinline__ void load_first_of_few_steps() {
#pragma unroll 1
        for (int s = 0; s < kStages - 1 && !done(); ++s) {
            load_weights(ring + s * kSlotBytes);
            advance();
        }
        dependency_wait();
        start();
#pragma unroll 1
        for (int s = 0; s < kStages - 1; ++s) {
            const SharedAddress to = next_slot();
            if (!done()) {
                load_activations(to);
                advance();
            }
            copy_async_commit();
        }
    }
};
