// y += scaling * scale * S x: the sparse deltas (CSR) of a step's rows, each item some outputs of one slice of one adapter for a
// group of up to 8 rows.
//
// Grid: any; CTA i takes the pieces [range[i], range[i + 1]), which items.py cuts so that all CTAs read about as many bytes.
// Block: 256 threads. x of up to TOKENS rows lies in shared memory; values and columns stream past it, 8 non-zeros (16 bytes
// of each) per lane at a time. An output's non-zeros are shared out over LANES = 1, 2, 4, .. 32 lanes, as many as an average
// output of the slice fills, so a row's sum is in an order that depends on its adapter alone. Rows of one group share each load.
// Macros: COLUMNS, inputs of the op; TOKENS, rows at a time (1, 2, 4).
// Alignment: COLUMNS % (16 / sizeof(elem)) == 0. Registers: 4 CTAs per SM, hence at most 64. Shared memory: see Shared.
// Architectures: sm_80 and up.
#include "lora/parts.cuh"

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kColumns = COLUMNS, kTokens = TOKENS;
constexpr int kOutputs = 512;  // outputs at a time
constexpr int kRun = 8;        // non-zeros that a lane loads at a time
constexpr int kAhead = 2;      // outputs that a lane loads for before it multiplies

struct Params {
    LoraTables lora;  // its entries are SparseEntry; range: [grid + 1]
    const elem* x;    // [rows, COLUMNS]
    elem* y;          // [rows, width]
    const float* scale;
    int slice_begin[kSlices + 1];
    int width;
    int value_shift, column_shift, start_shift;  // log2 of elements of a tile, wherever a matrix has several
};
static_assert(sizeof(Params) == 112, "params.py mirrors it");

struct Shared {
    alignas(16) elem x[kColumns * kTokens];  // [column][token]
    float sums[kTokens][kOutputs];
    int starts[kOutputs + 1];
};

struct Slice {
    i64 value_offset, column_offset, start_offset;
    int value_first, column_first, start_first, count;
    float scaling;
};
__device__ __forceinline__ Slice load_slice(const Params& p, int adapter, int slice) {
    const SparseEntry* e = reinterpret_cast<const SparseEntry*>(p.lora.entries) + adapter * p.lora.entry_stride;
    Slice s;
    s.count = static_cast<int>(load_lasting4(e->count + slice));
    s.scaling = __uint_as_float(load_lasting4(e->scaling + slice));
    s.value_first = static_cast<int>(load_lasting4(e->value_first + slice));
    s.column_first = static_cast<int>(load_lasting4(e->column_first + slice));
    s.start_first = static_cast<int>(load_lasting4(e->start_first + slice));
    s.value_offset = load_lasting8(e->value_offset + slice);
    s.column_offset = load_lasting8(e->column_offset + slice);
    s.start_offset = load_lasting8(e->start_offset + slice);
    return s;
}

// Where element `at` of a matrix lies; tiles that lie behind each other have no gaps.
template <int kItemBytes>
__device__ __forceinline__ const u8* element(const LoraTables& t, i64 offset, int first, int at, int shift) {
    if (offset >= 0) return t.pool + offset + static_cast<i64>(at) * kItemBytes;
    return t.pool + load_lasting8(t.tiles + first + (at >> shift)) + (at & ((1 << shift) - 1)) * kItemBytes;
}

struct Run {
    Quad columns;
#ifdef LORAPLEX_FP32
    Quad values[2];
#else
    Quad values[1];
#endif
    u32 live;  // bit i: non-zero i is the output's
};

// The non-zeros [at, at + kRun) as far as they are in [begin, end); `at` is a multiple of kRun.
__device__ __forceinline__ Run load_run(const Params& p, const Slice& s, int at, int begin, int end) {
    Run run;
    const int low = max(begin - at, 0), high = min(end - at, kRun);
    run.live = high > low ? (1u << high) - (1u << low) : 0;
    run.columns = Quad{};
#pragma unroll
    for (Quad& q : run.values) q = Quad{};
    if (run.live == 0) return run;
    const u8* values = element<sizeof(elem)>(p.lora, s.value_offset, s.value_first, at, p.value_shift);
    run.columns = load_weights16(element<2>(p.lora, s.column_offset, s.column_first, at, p.column_shift));
#pragma unroll
    for (int q = 0; q < static_cast<int>(sizeof(elem)) / 2; ++q) run.values[q] = load_weights16(values + q * 16);
    return run;
}

__device__ __forceinline__ u32 word_of(const Quad& q, int i) { return i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w; }

// Shared x of one column, kWidth rows.
template <int kWidth>
struct alignas(sizeof(elem) * kWidth) Column {
    elem v[kWidth];
};

template <int kWidth>
__device__ __forceinline__ void multiply(const Shared& shared, const Run& run, float (&sums)[kWidth]) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
        if (!(run.live >> i & 1)) continue;
        const u32 pair = word_of(run.columns, i / 2);
        const u32 column = i % 2 == 0 ? pair & 0xffff : pair >> 16;
#ifdef LORAPLEX_FP32
        const float value = __uint_as_float(word_of(run.values[i / 4], i % 4));
#else
        const u32 both = word_of(run.values[0], i / 2);
        const float value = i % 2 == 0 ? low_float(both) : high_float(both);
#endif
        const Column<kWidth> x = *reinterpret_cast<const Column<kWidth>*>(shared.x + column * kWidth);
#pragma unroll
        for (int t = 0; t < kWidth; ++t) sums[t] += value * to_float(x.v[t]);
    }
}

// Lanes that an average output's non-zeros fill.
__device__ __forceinline__ int lanes_of(int count, int outputs) {
    const int runs = count / outputs / kRun + 1;
    int lanes = 1;
    while (lanes < runs && lanes < kWarp) lanes *= 2;
    return lanes;
}

// Sums of `num` outputs whose starts are in shared memory.
template <int kWidth>
__device__ __forceinline__ void add_up(const Params& p, Shared& shared, const Slice& s, int lanes, int num) {
    const int lane = threadIdx.x % kWarp, within = lane & (lanes - 1), at_once = kThreads / lanes;
#pragma unroll 1
    for (int base = static_cast<int>(threadIdx.x) / lanes; base - lane / lanes < num; base += kAhead * at_once) {
        Run runs[kAhead];
        int begin[kAhead], end[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int output = base + i * at_once;
            begin[i] = output < num ? shared.starts[output] : 0;
            end[i] = output < num ? shared.starts[output + 1] : 0;
            runs[i] = load_run(p, s, (begin[i] / kRun + within) * kRun, begin[i], end[i]);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            float sums[kWidth] = {};
            multiply<kWidth>(shared, runs[i], sums);
#pragma unroll 1
            for (int at = (begin[i] / kRun + within + lanes) * kRun; at < end[i]; at += lanes * kRun)
                multiply<kWidth>(shared, load_run(p, s, at, begin[i], end[i]), sums);
#pragma unroll 1
            for (int mask = lanes / 2; mask > 0; mask /= 2) {
#pragma unroll
                for (int t = 0; t < kWidth; ++t) sums[t] += __shfl_xor_sync(kFullMask, sums[t], mask);
            }
            const int output = base + i * at_once;
            if (within == 0 && output < num) {
#pragma unroll
                for (int t = 0; t < kWidth; ++t) shared.sums[t][output] = sums[t];
            }
        }
    }
}

// Rows [first, first + kWidth) of a group's x, those behind `count` as zeros.
template <int kWidth>
__device__ __forceinline__ void keep_x(const Params& p, Shared& shared, const Group& group, int first, int count) {
#pragma unroll 1
    for (int column = threadIdx.x * kVec; column < kColumns; column += kThreads * kVec) {
        Vec rows[kWidth];
#pragma unroll
        for (int t = 0; t < kWidth; ++t) {
            rows[t] = Vec{};
            if (t < count) rows[t] = load_vec(p.x + static_cast<i64>(group.tokens[first + t]) * kColumns + column);
        }
        if constexpr (kWidth == 1) {
            store_vec(shared.x + column, rows[0]);
            continue;
        }
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            Column<kWidth> x;
#pragma unroll
            for (int t = 0; t < kWidth; ++t) x.v[t] = rows[t].v[j];
            *reinterpret_cast<Column<kWidth>*>(shared.x + (column + j) * kWidth) = x;
        }
    }
}

// Up to kWidth rows, from `first` of the group on, times `num` outputs from `output` (fused) on.
template <int kWidth>
__device__ __forceinline__ void add_rows(const Params& p, Shared& shared, const Slice& s, const Group& group, int lanes,
                                         int first, bool is_kept, int output, int num) {
    const int count = min(group.count - first, kWidth);
    if (!is_kept) keep_x<kWidth>(p, shared, group, first, count);
    __syncthreads();
    add_up<kWidth>(p, shared, s, lanes, num);
    __syncthreads();
#pragma unroll
    for (int t = 0; t < kWidth; ++t) {
        if (t >= count) break;
        const int row = group.tokens[first + t];
        const float factor = s.scaling * p.scale[row];
        elem* to = p.y + static_cast<i64>(row) * p.width + output;
        for (int i = threadIdx.x; i < num; i += kThreads) to[i] = from_float<elem>(to_float(to[i]) + factor * shared.sums[t][i]);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 4) lora_sparse(const Params p) {
    LORAPLEX_SHARED(Shared, shared);
    allow_dependents();
    const int end = static_cast<int>(load_lasting4(p.lora.range + blockIdx.x + 1));
    i64 kept = -1;  // whose x is in shared memory: group and first row
#pragma unroll 1
    for (int i = static_cast<int>(load_lasting4(p.lora.range + blockIdx.x)); i < end; ++i) {
        const Item item = load_item(p.lora, i);
        const int slice = (item.begin >= p.slice_begin[1]) + (item.begin >= p.slice_begin[2]);
        const Slice s = load_slice(p, item.adapter, slice);
        if (s.count == 0) continue;  // this layer has none
        const int lanes = lanes_of(s.count, p.slice_begin[slice + 1] - p.slice_begin[slice]);
        const Group& group = p.lora.groups[item.group];
#pragma unroll 1
        for (int done = 0; done < item.extent; done += kOutputs) {
            const int num = min(kOutputs, item.extent - done), at = item.begin - p.slice_begin[slice] + done;
            for (int o = threadIdx.x; o <= num; o += kThreads)
                shared.starts[o] = static_cast<int>(
                    load_lasting4(element<4>(p.lora, s.start_offset, s.start_first, at + o, p.start_shift)));
            dependency_wait();
#pragma unroll 1
            for (int first = 0; first < group.count; first += kTokens) {
                const i64 wanted = static_cast<i64>(item.group) * kGroupTokens + first;
                const int left = group.count - first, output = item.begin + done;
                if (kTokens == 1 || left == 1) {
                    add_rows<1>(p, shared, s, group, lanes, first, kept == wanted, output, num);
                } else if (kTokens == 2 || left == 2) {
                    add_rows<kTokens < 2 ? 1 : 2>(p, shared, s, group, lanes, first, kept == wanted, output, num);
                } else {
                    add_rows<kTokens>(p, shared, s, group, lanes, first, kept == wanted, output, num);
                }
                kept = wanted;
            }
        }
    }
    dependency_wait();  // a CTA without items must not let its grid complete before the one it depends on
}
