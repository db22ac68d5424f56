// y += scaling * scale * S x: the sparse deltas (CSR) of a step's rows, each item some outputs of one slice of one adapter for a
// group of up to 8 rows.
//
// Grid: any; CTA i takes the pieces [range[i], range[i + 1]), which sparse_items.py cuts so that all CTAs read about as many
// bytes. Block: THREADS threads; x of up to TOKENS rows lies in shared memory for all of them, and each warp takes outputs of
// its own, so that warps never wait for each other. A warp's non-zeros are one contiguous range. It goes past x in runs of 8
// (16 bytes of values, 16 of columns), a run per lane, whatever outputs they belong to: a lane adds up what lies before the
// first output that begins within its run, and what lies behind, and the output's lane adds up these sums. A run lies at a
// multiple of 8 of the slice's non-zeros, so the order of a row's sum depends on its adapter alone.
// Macros: COLUMNS, inputs of the op; TOKENS, rows at a time (1, 2, 4); THREADS, of which CTAS blocks share an SM; AHEAD, runs
// that a lane loads ahead; WIDE, whether x of one row is fp32; SHARED_BYTES, size of Shared.
// Alignment: COLUMNS % (16 / sizeof(elem)) == 0. Registers: 768 threads per SM, hence at most 80. Shared memory: see Shared.
// Architectures: sm_80 and up.
#include "lora/sparse.cuh"

// What a warp keeps of the outputs that it takes at a time.
struct WarpSums {
    float runs[kSums];                   // [row][run]: what belongs to the output that the run begins with
    float heads[kTokens][kOutputs + 1];  // of an output that begins within a run: what of it lies there
    int starts[kOutputs + 1];
    alignas(4) u8 marks[kSums];  // 1 + the first output that begins within the run, behind its first non-zero; or 0
};

struct Shared {
    alignas(16) elem x[kColumns * kTokens];  // [column][row]
    WarpSums warps[kWarps];
    alignas(16) Item items[kItems];
    Slice slices[kItems];
    Tiles tiles[kItems][3];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "sparse.py knows its size");

__device__ __forceinline__ u32 word_of(const Quad& q, int i) { return i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w; }

// x of one column, kWidth rows.
template <int kWidth>
struct alignas(sizeof(elem) * kWidth) Column {
    elem v[kWidth];
};

// Non-zero `i` of a run times x. Fused by name: where an item ends decides which of the loops below adds an output up, and each
// must round alike.
template <int kWidth>
__device__ __forceinline__ void multiply(const Shared& shared, const Run& run, int i, float (&sums)[kWidth]) {
    const u32 pair = word_of(run.columns, i / 2);
    const u32 column = i % 2 == 0 ? pair & 0xffff : pair >> 16;
#ifdef LORAPLEX_FP32
    const float value = __uint_as_float(word_of(run.values[i / 4], i % 4));
#else
    const u32 both = word_of(run.values[0], i / 2);
    const float value = i % 2 == 0 ? low_float(both) : high_float(both);
#endif
    if constexpr (kWidth == 1 && kIsWide) {
        sums[0] = fmaf(value, reinterpret_cast<const float*>(shared.x)[column], sums[0]);
    } else {
        const Column<kWidth> x = reinterpret_cast<const Column<kWidth>*>(shared.x)[column];
#pragma unroll
        for (int t = 0; t < kWidth; ++t) sums[t] = fmaf(value, to_float(x.v[t]), sums[t]);
    }
}

// Runs of which a warp keeps sums.
template <int kWidth>
constexpr int kWindow = kSums / kWidth;

// The sums of run `at`: of the output that it begins with, and of those that begin within it.
template <int kWidth>
__device__ __forceinline__ void add_up_run(const Shared& shared, WarpSums& mine, const Run& run, int at, int window, int num) {
    const int mark = mine.marks[at - window], first = at * kRun;
    const int before = mark != 0 ? mine.starts[mark - 1] - first : kRun;
    float sums[kWidth] = {}, behind[kWidth] = {};
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
        if (i < before) {
            multiply<kWidth>(shared, run, i, sums);
        } else {
            multiply<kWidth>(shared, run, i, behind);
        }
    }
#pragma unroll
    for (int t = 0; t < kWidth; ++t) mine.runs[t * kWindow<kWidth> + at - window] = sums[t];
    if (mark == 0 || mark > num) return;
    const int next = mine.starts[mark] - first;
    if (next >= kRun) {
#pragma unroll
        for (int t = 0; t < kWidth; ++t) mine.heads[t][mark - 1] = behind[t];
        return;
    }
    int begin = before;
#pragma unroll 1
    for (int output = mark - 1; output < num && begin < kRun; ++output) {  // several begin within the run
        const int end = min(mine.starts[output + 1] - first, kRun);
        float head[kWidth] = {};
#pragma unroll
        for (int i = 0; i < kRun; ++i)
            if (i >= begin && i < end) multiply<kWidth>(shared, run, i, head);
#pragma unroll
        for (int t = 0; t < kWidth; ++t) mine.heads[t][output] = head[t];
        begin = end;
    }
}

// Notes for each run of [window, stop) which output is the first to begin within it; `num` outputs, and the one behind them.
__device__ __forceinline__ void mark_runs(WarpSums& mine, int window, int stop, int num) {
    const int lane = lane_id();
#pragma unroll
    for (int i = 0; i < kSums / 4 / kWarp; ++i) reinterpret_cast<u32*>(mine.marks)[i * kWarp + lane] = 0;
    __syncwarp();
    for (int output = lane; output <= num; output += kWarp) {
        const int start = mine.starts[output], run = start / kRun;
        if (start % kRun == 0 || run < window || run >= stop) continue;
        if (output == 0 || mine.starts[output - 1] <= run * kRun) mine.marks[run - window] = static_cast<u8>(output + 1);
    }
    __syncwarp();
}

// Adds to an output's total what runs [window, stop) hold of it.
template <int kWidth>
__device__ __forceinline__ void add_runs(const WarpSums& mine, int output, int window, int stop, float (&total)[kWidth]) {
    const int begin = mine.starts[output], end = mine.starts[output + 1];
    if (begin == end) return;
    if (begin % kRun != 0 && begin / kRun >= window && begin / kRun < stop) {
#pragma unroll
        for (int t = 0; t < kWidth; ++t) total[t] += mine.heads[t][output];
    }
    const int last = min((end + kRun - 1) / kRun, stop);
#pragma unroll 1
    for (int run = max((begin + kRun - 1) / kRun, window); run < last; ++run) {
#pragma unroll
        for (int t = 0; t < kWidth; ++t) total[t] += mine.runs[t * kWindow<kWidth> + run - window];
    }
}

// A warp's outputs [at, end) of a slice times kWidth rows from `first` of the group on.
template <int kWidth>
__device__ __forceinline__ void add_outputs(const Params& p, Shared& shared, int number, int first, int at, int end) {
    const Tiles(&tiles)[3] = shared.tiles[number];
    constexpr bool kIsMany = kWidth * sizeof(elem) >= 8;  // rows, so that registers are few
    constexpr int kLoads = kIsMany ? 1 : kAhead, kRound = kLoads * kWarp;
    constexpr int kEach = kIsMany ? 1 : kOutputs / kWarp, kAtOnce = kEach * kWarp;
    static_assert(kWindow<kWidth> % kRound == 0, "loads ahead go on in the next window");
    WarpSums& mine = shared.warps[threadIdx.x / kWarp];
    const int lane = lane_id(), stop = (load_start(p, tiles, end) + kRun - 1) / kRun;
    Run runs[kLoads];
    const int from = load_start(p, tiles, at) / kRun;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) runs[i] = load_run(p, tiles, from + i * kWarp + lane, stop);
#pragma unroll 1
    for (; at < end; at += kAtOnce) {
        const int num = min(kAtOnce, end - at);
        int starts[kEach + 1];
#pragma unroll
        for (int i = 0; i <= kEach; ++i)
            if (i * kWarp + lane <= num) starts[i] = load_start(p, tiles, at + i * kWarp + lane);
#pragma unroll
        for (int i = 0; i <= kEach; ++i)
            if (i * kWarp + lane <= num) mine.starts[i * kWarp + lane] = starts[i];
        __syncwarp();
        const int behind = mine.starts[num], last = (behind + kRun - 1) / kRun;
        float totals[kEach][kWidth] = {};
#pragma unroll 1
        for (int window = mine.starts[0] / kRun; window < last; window += kWindow<kWidth>) {
            const int window_stop = min(window + kWindow<kWidth>, last);
            mark_runs(mine, window, window_stop, num);
#pragma unroll 1
            for (int run = window; run < window_stop; run += kRound) {
#pragma unroll
                for (int i = 0; i < kLoads; ++i) {
                    const int now = run + i * kWarp;
                    if (now >= window_stop) break;
                    add_up_run<kWidth>(shared, mine, runs[i], now + lane, window, num);
                    runs[i] = load_run(p, tiles, now + kRound + lane, last);
                }
            }
            if (window_stop == last && at + kAtOnce < end) {  // the next outputs' runs
#pragma unroll
                for (int i = 0; i < kLoads; ++i) runs[i] = load_run(p, tiles, behind / kRun + i * kWarp + lane, stop);
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < kEach; ++i)
                if (i * kWarp + lane < num) add_runs<kWidth>(mine, i * kWarp + lane, window, window_stop, totals[i]);
            __syncwarp();
        }
        const Slice& s = shared.slices[number];
        const Group& group = p.lora.groups[shared.items[number].group];
#pragma unroll
        for (int t = 0; t < kWidth; ++t) {
            if (first + t >= group.count) break;
            const int row = group.tokens[first + t];
            const float factor = s.scaling * p.scale[row];
            elem* to = p.y + static_cast<i64>(row) * p.width + s.fused + at + lane;
#pragma unroll
            for (int i = 0; i < kEach; ++i)
                if (i * kWarp + lane < num)
                    to[i * kWarp] = from_float<elem>(fmaf(factor, totals[i][t], to_float(to[i * kWarp])));
        }
        __syncwarp();  // before the next outputs' starts
    }
}

// Rows [first, first + kWidth) of a group's x, those behind its last as zeros.
template <int kWidth>
__device__ __forceinline__ void keep_x(const Params& p, Shared& shared, const Group& group, int first) {
#pragma unroll 1
    for (int column = threadIdx.x * kVec; column < kColumns; column += kThreads * kVec) {
        Vec rows[kWidth];
#pragma unroll
        for (int t = 0; t < kWidth; ++t) {
            rows[t] = Vec{};
            if (first + t < group.count)
                rows[t] = load_vec(p.x + static_cast<i64>(group.tokens[first + t]) * kColumns + column);
        }
        if constexpr (kWidth == 1 && !kIsWide) {
            store_vec(shared.x + column, rows[0]);
            continue;
        }
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            if constexpr (kWidth == 1) {
                reinterpret_cast<float*>(shared.x)[column + j] = to_float(rows[0].v[j]);
            } else {
                Column<kWidth> x;
#pragma unroll
                for (int t = 0; t < kWidth; ++t) x.v[t] = rows[t].v[j];
                *reinterpret_cast<Column<kWidth>*>(shared.x + (column + j) * kWidth) = x;
            }
        }
    }
}

// An item for kWidth rows, from `first` of the group on.
template <int kWidth>
__device__ __forceinline__ void add_rows(const Params& p, Shared& shared, int number, int first, bool is_kept) {
    const Item& item = shared.items[number];
    const Slice& s = shared.slices[number];
    const Group& group = p.lora.groups[item.group];
    if (!is_kept) {
        __syncthreads();  // warps may still read the x that was kept
        keep_x<kWidth>(p, shared, group, first);
        __syncthreads();
    }
    const int begin = item.begin - s.fused, warp = threadIdx.x / kWarp;
    add_outputs<kWidth>(p, shared, number, first, begin + item.extent * warp / kWarps,
                        begin + item.extent * (warp + 1) / kWarps);
}

extern "C" __global__ void __launch_bounds__(kThreads, CTAS) lora_sparse(const Params p) {
    LORAPLEX_SHARED(Shared, shared);
    allow_dependents();
    const int end = static_cast<int>(load_lasting4(p.lora.range + blockIdx.x + 1));
    i64 kept = -1;  // whose x is in shared memory: group and first row
#pragma unroll 1
    for (int base = static_cast<int>(load_lasting4(p.lora.range + blockIdx.x)); base < end; base += kItems) {
        __syncthreads();
        const int num = min(kItems, end - base);
        if (static_cast<int>(threadIdx.x) < num) {
            const Item item = load_item(p.lora, base + threadIdx.x);
            shared.items[threadIdx.x] = item;
            shared.slices[threadIdx.x] = load_slice(p, item);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < num * 3 * kTiles; i += kThreads) {
            const int item = i / (3 * kTiles), matrix = i / kTiles % 3;
            keep_tiles(p, shared.tiles[item][matrix], shared.items[item], shared.slices[item], matrix, i % kTiles);
        }
        dependency_wait();
        __syncthreads();
#pragma unroll 1
        for (int i = 0; i < num; ++i) {
            if (shared.slices[i].count == 0) continue;  // this layer has none
            const int which = shared.items[i].group, rows = p.lora.groups[which].count;
#pragma unroll 1
            for (int first = 0; first < rows; first += kTokens) {
                const i64 wanted = static_cast<i64>(which) * kGroupTokens + first;
                if (kTokens == 1 || rows - first == 1) {
                    add_rows<1>(p, shared, i, first, kept == wanted);
                } else if (kTokens == 2 || rows - first == 2) {
                    add_rows < kTokens<2 ? 1 : 2>(p, shared, i, first, kept == wanted);
                } else {
                    add_rows<kTokens>(p, shared, i, first, kept == wanted);
                }
                kept = wanted;
            }
        }
    }
    dependency_wait();  // a CTA without items must not let its grid complete before the one it depends on
}
