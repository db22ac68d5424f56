// What the kernel of sparse deltas reads of the pool: entries, tiles, runs of non-zeros. Macros: see sparse.cu.
#pragma once
#include "lora/parts.cuh"

constexpr int kThreads = THREADS, kWarps = kThreads / kWarp;
constexpr int kColumns = COLUMNS, kTokens = TOKENS, kAhead = AHEAD;
constexpr int kOutputs = 64;         // outputs of a warp at a time
constexpr int kRun = 8;              // non-zeros that a lane loads at a time
constexpr int kSums = 128 * kAhead;  // sums of runs that a warp keeps: of kSums / rows runs
constexpr int kItems = 4;            // items whose entries and tiles a CTA reads at once
constexpr int kTiles = 32;           // tiles of a matrix that it notes; of a matrix with more, those from the item's first on
constexpr bool kIsWide = WIDE != 0 && TOKENS >= 2;  // x of one row is fp32, for which there is room

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

struct Slice {
    int matrices[3];  // number of the first tile of values, columns, starts
    int count;
    float scaling;
    int fused;  // its first output
};

// Where tiles of an item's matrix lie.
struct Tiles {
    const u8* at[kTiles];
    int first;   // at[0]
    int matrix;  // the matrix's first in the tile table
};
enum Matrix { kValues, kColumnNumbers, kStarts };

__device__ __forceinline__ Slice load_slice(const Params& p, const Item& item) {
    const SparseEntry* e = reinterpret_cast<const SparseEntry*>(p.lora.entries) + item.adapter * p.lora.entry_stride;
    const int slice = (item.begin >= p.slice_begin[1]) + (item.begin >= p.slice_begin[2]);
    Slice s;
    s.count = static_cast<int>(load_lasting4(e->count + slice));
    s.scaling = __uint_as_float(load_lasting4(e->scaling + slice));
    s.matrices[kValues] = static_cast<int>(load_lasting4(e->value_first + slice));
    s.matrices[kColumnNumbers] = static_cast<int>(load_lasting4(e->column_first + slice));
    s.matrices[kStarts] = static_cast<int>(load_lasting4(e->start_first + slice));
    s.fused = slice == 0 ? 0 : slice == 1 ? p.slice_begin[1] : p.slice_begin[2];
    return s;
}

__device__ __forceinline__ const u8* tile_address(const LoraTables& t, int matrix, int tile) {
    return t.pool + load_lasting8(t.tiles + matrix + tile);
}

// Notes where a matrix's tiles lie: thread `part` of kTiles.
__device__ __forceinline__ void keep_tiles(const Params& p, Tiles& tiles, const Item& item, const Slice& s, int matrix,
                                           int part) {
    const int shift = matrix == kValues ? p.value_shift : matrix == kColumnNumbers ? p.column_shift : p.start_shift;
    const int begin = item.begin - s.fused;
    int first = 0, last = (begin + item.extent) >> shift;
    if (matrix != kStarts) {
        last = (s.count - 1) >> shift;
        if (last >= kTiles) {
            const int at = begin >> p.start_shift, within = begin & ((1 << p.start_shift) - 1);
            const u8* start = tile_address(p.lora, s.matrices[kStarts], at) + within * 4;
            first = min(static_cast<int>(load_lasting4(start)) >> shift, last);
        }
    }
    if (first + part <= last) tiles.at[part] = tile_address(p.lora, s.matrices[matrix], first + part);
    if (part == 0) tiles.first = first, tiles.matrix = s.matrices[matrix];
}

// Where piece number `at` of a matrix lies, of 1 << shift to a tile.
template <int kBytes>
__device__ __forceinline__ const u8* address(const LoraTables& t, const Tiles& tiles, int at, int shift) {
    const int tile = at >> shift, noted = tile - tiles.first;
    const u8* from = noted < kTiles ? tiles.at[noted] : tile_address(t, tiles.matrix, tile);
    return as_global(from) + (at & ((1 << shift) - 1)) * kBytes;
}

struct Run {
    Quad columns;
#ifdef LORAPLEX_FP32
    Quad values[2];
#else
    Quad values[1];
#endif
};

// Run number `run` of a slice, zeros from run `stop` on. What lies behind the last non-zero of a tile is zeros: adapter_image.py.
__device__ __forceinline__ Run load_run(const Params& p, const Tiles (&tiles)[3], int run, int stop) {
    Run loaded = {};
    if (run >= stop) return loaded;
    constexpr int kShift = 3;  // log2 of kRun
    const u8* values = address<kRun * sizeof(elem)>(p.lora, tiles[kValues], run, p.value_shift - kShift);
    loaded.columns = load_weights16(address<kRun * 2>(p.lora, tiles[kColumnNumbers], run, p.column_shift - kShift));
#pragma unroll
    for (int q = 0; q < static_cast<int>(sizeof(elem)) / 2; ++q) loaded.values[q] = load_weights16(values + q * 16);
    return loaded;
}

__device__ __forceinline__ int load_start(const Params& p, const Tiles (&tiles)[3], int output) {
    return static_cast<int>(load_lasting4(address<4>(p.lora, tiles[kStarts], output, p.start_shift)));
}
