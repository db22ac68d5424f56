// The expand of qkv folded into qk-norm + rotary embedding + KV write (lora_expand.cuh, rope.cuh). Groups of adapter -1
// carry the rows without one.
//
// Work item: begin = first fused output, extent = outputs: whole heads of one of q, k, v. Grid: any; CTAs stride over the
// items. Block: 4 warps; of an item's heads, warp w takes every fourth: lane (g, c) ends with dims 8 g .. 8 g + 7 of each
// block of 64 of tokens 2 c and 2 c + 1. Their rotary partners are the lane's own in the other block (HEAD_DIM 128), or
// lane g ^ 4's (HEAD_DIM 64). Shared memory: 9 KiB of h and 3 KiB of items. Alignment: rows on 16 bytes.
// Registers: 3 CTAs of 128 threads per SM, hence at most 168. Architectures: sm_80 and up.
#include "lora_expand.cuh"
#include "rope.cuh"

static_assert(kHeadDim == 64 || kHeadDim == 128, "a head is one or two blocks");
constexpr int kHeadBlocks = kHeadDim / kBlockRows;
constexpr int kHalf = kHeadDim / 2;

struct Params {
    LoraTables lora;
    ExpandParams expand;
    RopeParams rope;
};
static_assert(sizeof(Params) == 192, "params.py mirrors it");

// This lane's dims of a head: of one token, 8 of each block.
struct Head {
    float v[kHeadBlocks][kLaneRows];
};

// Multiplies a head by its norm's weight over its root mean square; the lanes of a token differ in bits 2..4.
__device__ __forceinline__ void norm_head(const elem* weight, float eps, Head& head) {
    float squares = 0.f;
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b)
#pragma unroll
        for (int j = 0; j < kLaneRows; ++j) squares += head.v[b][j] * head.v[b][j];
#pragma unroll
    for (int mask = 4; mask < kWarp; mask <<= 1) squares += __shfl_xor_sync(kFullMask, squares, mask);
    const float scale = rsqrtf(squares / kHeadDim + eps);
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
        const Octet w = load_octet(weight + b * kBlockRows + lane_row());
#pragma unroll
        for (int j = 0; j < kLaneRows; ++j) head.v[b][j] = rounded(w.get(j) * rounded(head.v[b][j] * scale));
    }
}

__device__ __forceinline__ void rotate_head(const float* rotary, Head& head) {
    const int pair = lane_row() % kHalf;  // this lane's pairs: pair .. pair + 7
    alignas(16) float cosine[kLaneRows], sine[kLaneRows];
#pragma unroll
    for (int j = 0; j < kLaneRows; j += 4) {
        *reinterpret_cast<Quad*>(cosine + j) = *reinterpret_cast<const Quad*>(rotary + pair + j);
        *reinterpret_cast<Quad*>(sine + j) = *reinterpret_cast<const Quad*>(rotary + kHalf + pair + j);
    }
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) {
        if constexpr (kHeadBlocks == 2) {
            const float low = head.v[0][j], high = head.v[kHeadBlocks - 1][j];
            head.v[0][j] = low * cosine[j] - high * sine[j];
            head.v[kHeadBlocks - 1][j] = high * cosine[j] + low * sine[j];
        } else {
            const float mine = head.v[0][j], other = __shfl_xor_sync(kFullMask, mine, kWarp / 2);
            head.v[0][j] = lane_row() < kHalf ? mine * cosine[j] - other * sine[j] : mine * cosine[j] + other * sine[j];
        }
    }
}

// This lane's place in fused head `head` of a token.
__device__ __forceinline__ elem* qkv_address(const RopeParams& p, int token, int head) {
    return p.qkv + (static_cast<i64>(token) * (p.num_heads + 2 * p.num_kv_heads) + head) * kHeadDim + lane_row();
}

// One head of one token, delta added: all lanes take part, those without a token (-1) write nothing.
__device__ __forceinline__ void finish_token(const RopeParams& p, int token, int index, const Octet (&sums)[kHeadBlocks]) {
    const bool is_q = index < p.num_heads, is_v = index >= p.num_heads + p.num_kv_heads;
    Head head;
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b)
#pragma unroll
        for (int j = 0; j < kLaneRows; ++j) head.v[b][j] = sums[b].get(j);
    const elem* norm = is_q ? p.q_norm : is_v ? nullptr : p.k_norm;
    if (norm) norm_head(norm, p.norm_eps, head);
    if (!is_v) rotate_head(p.rotary + static_cast<i64>(token >= 0 ? p.positions[token] : 0) * kHeadDim, head);
    if (token < 0) return;
    elem* to;
    if (is_q) {
        to = qkv_address(p, token, index);
    } else {
        const int slot = p.kv_slots[token];
        if (slot < 0) return;
        to = kv_address(p, slot, index - p.num_heads) + lane_row();
    }
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
        Octet o;
#pragma unroll
        for (int j = 0; j < kLaneRows; ++j) o.set(j, head.v[b][j]);
        store_octet(to + b * kBlockRows, o);
    }
}

__device__ __forceinline__ int position_of(const RopeParams& p, const Group& group, int which) {
    const int token = lane_token(group, which);
    return token >= 0 ? p.positions[token] : 0;
}

// Asks for what finishing a head of this lane's tokens needs last.
__device__ __forceinline__ void prefetch_head(const RopeParams& p, const Group& group, int head) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        const int token = lane_token(group, which);
        if (token < 0) continue;
        const elem* row = qkv_address(p, token, head);
        prefetch_to_l1(row);
        if constexpr (kHeadBlocks == 2) prefetch_to_l1(row + kBlockRows);
        prefetch_to_l1(p.kv_slots + token);
    }
}

// A block's sums for this lane's two tokens.
__device__ __forceinline__ void add_block(const RopeParams& p, const Group& group, int head, int block,
                                          const Delta& delta, Octet (&sums)[2][kHeadBlocks]) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        const int token = lane_token(group, which);
        sums[which][block] = load_sum(qkv_address(p, token, head) + block * kBlockRows, token >= 0, delta, which);
    }
}

struct Shared {
    ExpandBatch resolved;
    HiddenTile hidden;
};

struct FinishItem {
    const Params& p;
    Shared& shared;
    int which;
    template <Rows kRows>
    __device__ __forceinline__ void run() const;
};

template <Rows kRows>
__device__ __forceinline__ void FinishItem::run() const {
    const Item& item = shared.resolved.batch.items[which];
    const Group& group = shared.resolved.batch.groups[which];
    const SliceInfo& slice = shared.resolved.slices[which][0];
    bool is_staged = false;
#pragma unroll 1
    for (int n = threadIdx.x / kWarp * kHeadDim; n < item.extent || !is_staged; n += kExpandWarps * kHeadDim) {
        const int rows = n < item.extent ? kBlockRows : 0, index = n / kBlockRows;
        Block low = begin_block<kRows, 0>(p.lora, shared.resolved, which, index, slice, rows), high;
        if constexpr (kHeadBlocks == 2)
            high = begin_block<kRows, 1>(p.lora, shared.resolved, which, index + 1, slice, rows);
        const int head = (item.begin + n) / kHeadDim;
        if (!is_staged) {
            dependency_wait();
            if (rows > 0) prefetch_head(p.rope, group, head);
            const int positions[2] = {position_of(p.rope, group, 0), position_of(p.rope, group, 1)};
            if constexpr (kRows != Rows::kNone) stage_hidden(p.expand, slice, group, shared.hidden);
#pragma unroll
            for (int which = 0; which < 2; ++which)
                prefetch_to_l1(p.rope.rotary + static_cast<i64>(positions[which]) * kHeadDim + lane_row() * kHeadBlocks);
            if constexpr (kRows != Rows::kNone) __syncthreads();
            is_staged = true;
        }
        if (rows == 0) break;
        Octet sums[2][kHeadBlocks];
        add_block(p.rope, group, head, 0, finish_block<kRows, 0>(p.lora, low, shared.hidden), sums);
        if constexpr (kHeadBlocks == 2) add_block(p.rope, group, head, 1, finish_block<kRows, 1>(p.lora, high, shared.hidden), sums);
#pragma unroll
        for (int token = 0; token < 2; ++token) {
            in_order();
            finish_token(p.rope, lane_token(group, token), head, sums[token]);
        }
    }
    if constexpr (kRows != Rows::kNone) __syncthreads();
}

extern "C" __global__ void __launch_bounds__(kExpandThreads, 3) lora_rope_kv(const Params p) {
    __shared__ Shared shared;
    allow_dependents();
    const int num_items = p.lora.range[1];
    for (int first = 0; item_index(first) < num_items; first += kBatch) {
        const int count = resolve<false>(p.lora, p.expand, first, num_items, shared.resolved);
        for (int which = 0; which < count; ++which)
            with_rows(rows_of(shared.resolved.slices[which][0].rank), FinishItem{p, shared, which});
        __syncthreads();
    }
    dependency_wait();
}
