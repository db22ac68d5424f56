// B's way to a warp of lora/expand.cu: copies into shared memory that run kAhead passes ahead of the products, over the
// ends of blocks and of items, so that a warp always has loads on their way.
//
// A pass is four 16-byte vectors a lane: 2 KiB a warp, and no other warp waits for it. Groups of copies count slots, empty
// ones at the end of a batch among them, so that the slot read last is always the one to be filled next.
#pragma once
#include "lora/expand.cuh"

constexpr int kAhead = 2;  // slots of a warp; more made rank 16 up to 12 % slower (benchmarks/NOTES.md)

#ifndef LORAPLEX_FP32
constexpr int kVectorStride = kWarp * sizeof(Quad);
constexpr int kSlotBytes = kLoads * kVectorStride;

struct alignas(128) RingSlots {
    u8 bytes[kExpandWarps][kAhead][kSlotBytes];
};

// A pass as operands A.
struct Fragments {
    u32 v[kLoads][4];
};

// Bytes to a vector of lane (g, c): neither the lanes of a copy nor the eight lanes (., c) of a matrix meet a bank conflict.
__device__ __forceinline__ int vector_at(int g, int c) { return (g * 4 + (c ^ (g / 2 & 3))) * static_cast<int>(sizeof(Quad)); }

// Walks over the passes of a warp's blocks in the order in which the products need them. Blocks that are not read as
// vectors have none.
struct Ring {
    const u8* pool;
    const Block* blocks;
    SharedAddress slots;  // the warp's
    int slot = 0;         // bytes to the one that is next, to read and then to fill
    int at = 0, end = 0;  // block to copy next
    int half = 0, k = 0;  // of its passes

    __device__ __forceinline__ Ring(const u8* pool, const ExpandBatch& resolved, RingSlots& shared)
        : pool(pool), blocks(resolved.blocks), slots(address_of(shared.bytes[threadIdx.x / kWarp])) {}

    // Asks for the first passes of a batch; the one before is used up.
    __device__ __forceinline__ void start(int num_items) {
        at = threadIdx.x / kWarp, end = num_items * kItemBlocks, half = k = 0;
#pragma unroll 1
        for (int i = 0; i < kAhead; ++i) fill(), step();
    }
    // The next pass of a batch, whose slot is filled again. At rank 8 and 16 operand i is the four matrices (i, .); above, two
    // of each of two vectors: 0 and 1 with the first 16 values of k, with the second, then 2 and 3 likewise.
    template <Rows kRows>
    __device__ __forceinline__ void take(Fragments& to) {
        copy_async_wait<kAhead - 1>();
        __syncwarp();
        const int lane = lane_id(), matrix = lane / 8;
        const SharedAddress from = slots + slot;
        if constexpr (kRows == Rows::kOne) {
            const int first = matrix % 2 * kVectorStride + vector_at(lane % 8, matrix / 2);
            const int second = first ^ 2 * sizeof(Quad);  // vector_at(lane % 8, matrix / 2 + 2)
#pragma unroll
            for (int i = 0; i < kLoads; ++i)
                load_matrices(to.v[i], from + i / 2 * 2 * kVectorStride + (i % 2 ? second : first));
        } else {
            const int column = kRows == Rows::kTwo ? matrix % 2 * 2 + matrix / 2 : matrix;
#pragma unroll
            for (int i = 0; i < kLoads; ++i) load_matrices(to.v[i], from + i * kVectorStride + vector_at(lane % 8, column));
        }
        __syncwarp();
        fill(), step();
    }

    __device__ __forceinline__ void step() { slot = slot == (kAhead - 1) * kSlotBytes ? 0 : slot + kSlotBytes; }
    __device__ __forceinline__ void fill() {
#pragma unroll 1
        while (at < end && blocks[at].vector_rank == 0) at += kExpandWarps;
        if (at < end) copy();
        copy_async_commit();
    }
    // The next pass of block `at`. One pass takes all of a row up to rank 16, and both blocks of a warp at rank 8; otherwise 32
    // values of k of the first or last four outputs of every eight, all k of these first, so that a row's bytes are asked for
    // together. Zeros past the rank, for what is there may be no number. Rows past the block are left alone: nobody stores
    // what becomes of them.
    __device__ __forceinline__ void copy() {
        const int lane = lane_id(), g = lane / 4, c = lane % 4;
        const Block block = blocks[at];
        const int rank = block.vector_rank, row_bytes = rank * 2;
        const bool is_one_pass = rank <= 16;
        const int stride = is_one_pass ? 64 : row_bytes, step = rank == 8 ? kItemBlocks : kExpandWarps;
        const int within = (kLaneRows * g + half * 4) * row_bytes + k * 2 + c * 16;
        const u8* upper = pool + block.base(g) + within;
        const u8* lower = upper + 2 * stride;
        const bool is_live = kLaneRows * g < block.rows;
        bool is_lower_live = is_live;
        if (rank == 8) {
            const Block other = blocks[at + kExpandWarps];
            lower = pool + other.base(g) + within, is_lower_live = kLaneRows * g < other.rows;
        }
        const u32 bytes = is_one_pass || k + c * 8 < rank ? 16 : 0;
        const SharedAddress to = slots + slot + vector_at(g, c);
        copy_async16_if(to, upper, bytes, is_live);
        copy_async16_if(to + kVectorStride, upper + stride, bytes, is_live);
        copy_async16_if(to + 2 * kVectorStride, lower, bytes, is_lower_live);
        copy_async16_if(to + 3 * kVectorStride, lower + stride, bytes, is_lower_live);
        k += 32;
        if (k >= rank) k = 0, ++half;
        if (is_one_pass || half == 2) half = 0, at += step;
    }
};
static_assert(kWarpBlocks == 2, "a slot holds a warp's blocks of an item of rank 8");
#endif
