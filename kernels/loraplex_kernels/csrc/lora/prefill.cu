// y[t, n] += scaling * scale[t] * (x[t] * A^T) * B^T for runs of tokens of one adapter: LoRA at prefill in one launch.
//
// Work item: (<= 64 tokens, one slice, a share of its outputs); one cluster each. The CTAs of a cluster share the columns
// of x, add their fp32 partial h in order through distributed shared memory, scale and round it to bf16, and each then
// writes its share of the outputs: h never leaves the cluster, and the phases of the CTAs on an SM overlap. Partial sums and
// h go by asynchronous stores, and each CTA waits for the bytes it gets; only that all have started is a cluster barrier.
// bf16 only: wgmma on sm_90a above rank 16, else mma.m16n8k16 (lora/prefill_products.cuh), with tokens as M; rank rows, then
// outputs, as N. Rank above 64: blocks of 64, x read again.
// All that is read comes through one ring of slots filled by cp.async: x[64][64] and A[RANKS][64] of each step, then
// y[64][64] and B[64][RANKS] of each chunk, so that the memory system never waits for the sums between them. 16-byte
// chunks are XOR-swizzled the way wgmma reads them and ldmatrix meets no conflict. Within 32 outputs B's rows are permuted
// so that a lane ends with 8 neighbouring outputs of a token: y is the accumulator's initial value and is written as
// 16-byte vectors. Within 16 rank rows A's are, so that a lane sends 4 neighbouring sums at a time.
// Tile addresses are looked up once per CTA, all at a time: the loops hold no division and no dependent load. A stacked
// rank above 256 leaves A's tiles 32 or 16 columns: PARTS = 4 looks up each 16 columns of a step by themselves. PARTS = 8 is for
// ranks above 256 of a slice, and above 768 stacked: tiles of 8 columns, and two launches, one for the first 256 rank rows and one
// for the others of the slices that have them, as h of more would leave the ring no shared memory.
// Alignment: columns % 8 == 0, x and y rows on 16 bytes.
// Shared memory: an SM's divided by 2 or 3 (by 2 for a rank above 64); the ring's slots take what the rest leaves.
// Registers: 3 CTAs of 256 threads per SM, hence at most 80.
// Architectures: sm_90 and up with CLUSTER > 1, sm_80 and up with CLUSTER = 1.
// Source: Chen et al., arXiv:2310.18547 (Punica's SGMV).
#include "lora/prefill_products.cuh"

// Partial sums of x * A^T of a warp's tokens and half of the rank rows of a block.
struct Partial {
    float d[kHalfTiles][4];
    Warp warp;
    Tiles tiles;
    static constexpr u32 kTogether = kRanks == 16 ? 1 : 2;  // tiles, of which a lane's sums are neighbours

    __device__ __forceinline__ void add(SharedAddress x, SharedAddress a) { multiply_step(d, warp, tiles, x, a); }
    // A lane's neighbouring sums of one token, in one tile or two.
    template <u32 kTiles>
    __device__ __forceinline__ auto neighbours(u32 n, u32 i) const {
        const Pair first{__float_as_uint(d[n][i]), __float_as_uint(d[n][i + 1])};
        if constexpr (kTiles == 1) {
            return first;
        } else {
            return Quad{first.x, first.y, __float_as_uint(d[n + 1][i]), __float_as_uint(d[n + 1][i + 1])};
        }
    }
    // To the CTAs that sum them.
    __device__ __forceinline__ void send(const Job& job, Shared& shared, u32 cta, u32 block) const {
        const u32 g = warp.lane / 4, c = warp.lane % 4;
        const SharedAddress partial = address_of(shared.partial), landed = address_of(&shared.partial_landed[block]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32 token = warp.m * 16 + half * 8 + g, row = cta * kOwned + token % kOwned;
            if (token >= job.count) break;
#pragma unroll
            for (u32 n = 0; n < kHalfTiles; n += kTogether) {
                if (n >= tiles.count) break;
                const SharedAddress to = partial + partial_at(row, (tiles.first + n) * 8 + 2 * kTogether * c) * 4;
                store_peer<kCluster>(to, landed, token / kOwned, neighbours<kTogether>(n, 2 * half));
            }
        }
    }
};

// Expects all that the cluster will store here: of each block, partial sums of the tokens this CTA owns, and h of all.
// Exactly: sums and h of rows past the last token are stored nowhere.
__device__ __forceinline__ void expect_exchange(const Job& job, Shared& shared, u32 cta) {
    if (kCluster == 1 || threadIdx.x != kThreads / 2) return;  // of a warp that has the fewest tiles to look up
    const u32 first = cta * kOwned, owned = min(kOwned, max(job.count, first) - first);
#pragma unroll 1
    for (u32 block = 0; block * kStep < job.rank; ++block) {
        const u32 columns = padded(job.rank - block * kStep);
        expect_bytes<kCluster>(address_of(&shared.partial_landed[block]), kCluster * owned * columns * 4);
        expect_bytes<kCluster>(address_of(&shared.hidden_landed[block]), job.count * columns * 2);
    }
    reveal_expected();
}

// h of the tokens this CTA owns: sums in the order of the columns, scales, rounds, and hands them to all.
__device__ __forceinline__ void sum_partials(const Job& job, Shared& shared, u32 cta, u32 block) {
    const u32 left = job.rank - block * kStep, lg = left > 32 ? 4 : left > 16 ? 3 : 2;
    for (u32 i = threadIdx.x; i < kOwned << lg; i += kThreads) {
        const u32 owned = i >> lg, column = (i & ((1 << lg) - 1)) * 4, token = cta * kOwned + owned;
        if (token >= job.count || column >= padded(left)) continue;
        float v[4] = {};
#pragma unroll
        for (u32 source = 0; source < kCluster; ++source) {
            const Quad q = *reinterpret_cast<const Quad*>(&shared.partial[partial_at(source * kOwned + owned, column)]);
            v[0] += __uint_as_float(q.x), v[1] += __uint_as_float(q.y);
            v[2] += __uint_as_float(q.z), v[3] += __uint_as_float(q.w);
        }
        const float factor = shared.scale[token];
        const Pair h{pack_bf16(v[0] * factor, v[1] * factor), pack_bf16(v[2] * factor, v[3] * factor)};
        const SharedAddress to = address_of(shared.hidden[block]) + swizzled(token, column / 8) + column % 8 * 2;
        const SharedAddress landed = address_of(&shared.hidden_landed[block]);
#pragma unroll
        for (u32 peer = 0; peer < kCluster; ++peer) store_peer<kCluster>(to, landed, peer, h);
    }
}

// A warp's 16 tokens x 32 outputs of a chunk.
struct Outputs {
    float d[4][4];
    elem* at;
    i64 stride;         // elements to the lane's second token
    u32 tokens, limit;  // from this lane's first token and output to the end
    Warp warp;
    u32 lg;

    __device__ __forceinline__ void start(SharedAddress y) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32 row = warp.m * 16 + half * 8 + warp.lane / 4;
            const Quad q = load_shared16(y + swizzled(row, warp.n * 4 + warp.lane % 4));
            const u32 pairs[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) d[j][2 * half] = low_float(pairs[j]), d[j][2 * half + 1] = high_float(pairs[j]);
        }
    }
    __device__ __forceinline__ void add(SharedAddress hidden, SharedAddress b, u32 left) {
        multiply_chunk(d, warp, hidden, b, lg, padded(left));
    }
    __device__ __forceinline__ void store(u32 chunk) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const auto pair = [&](int j) { return pack_bf16(d[j][2 * half], d[j][2 * half + 1]); };
            store_global16_if(at + half * stride + chunk * kStep, Quad{pair(0), pair(1), pair(2), pair(3)},
                              half * 8 < tokens && chunk * kStep < limit);
        }
    }
};

extern "C" __global__ void LORAPLEX_CLUSTER __launch_bounds__(kThreads, 3) lora_prefill(const Params p) {
    LORAPLEX_SHARED(Shared, shared);
    allow_dependents();
    const u32 cta = cluster_rank<kCluster>();
    const Segment item = segments(p.lora)[blockIdx.x / kCluster];
    const OpEntry& entry = p.lora.entries[item.adapter * p.lora.entry_stride];
    const Job job = make_job(p, item, entry, cta);
    if (job.rank == 0) return dependency_wait();  // this layer's slice is not adapted: the whole cluster leaves
    expect_exchange(job, shared, cta);
    cluster_arrive<kCluster>();
    const float scaling = entry.scaling[item.part & 3];
    look_up_tiles(p, entry, job, item.part & 3, shared);
    __syncthreads();
    Loader loader(p, job, shared);
    loader.load_first();
    if (threadIdx.x < job.count) shared.scale[threadIdx.x] = p.scale[job.token_begin + threadIdx.x] * scaling;

    const Warp warp = this_warp();
    const bool live = warp.m * 16 < job.count, multiplies = live || kWarpgroups;
    const SharedAddress hidden = address_of(shared.hidden);
    u32 slot = 0;
    const auto next_slot = [&] {  // the next slot has landed, and the one before it is done with by all
        copy_async_wait<kStages - 2>();
        reveal();
        __syncthreads();
        loader.load();
        const SharedAddress from = loader.ring + slot * kSlotBytes;
        slot = slot + 1 == kStages ? 0 : slot + 1;
        return from;
    };
    const auto await_hidden = [&](u32 block) { await_bytes<kCluster>(address_of(&shared.hidden_landed[block])); };
    if (job.steps == 0) __syncthreads();  // the scales, which a step's barrier hands over otherwise
    for (u32 block = 0; block * kStep < job.rank; ++block) {
        Partial sum{{}, warp, tiles_of(warp, padded(job.rank - block * kStep))};
        for (u32 step = 0; step < job.steps; ++step) {
            const SharedAddress x = next_slot();
            if (multiplies) sum.add(x, x + kActivationBytes);
        }
        if (block == 0) {
            cluster_wait<kCluster>();  // all have started
        } else {
            await_hidden(block - 1);  // whoever stored h of a token has read the partial sums that its next ones replace
        }
        sum.send(job, shared, cta, block);
        await_bytes<kCluster>(address_of(&shared.partial_landed[block]));
        sum_partials(job, shared, cta, block);
    }
    await_hidden((job.rank - 1) / kStep);  // all that peers store here has landed, so a CTA may leave when it is done

    Outputs out;
    out.warp = warp, out.lg = loader.lg;
    const u32 first_token = warp.m * 16 + warp.lane / 4, first_output = warp.n * 32 + warp.lane % 4 * 8;
    out.stride = 8 * p.y_stride, out.tokens = max(job.count, first_token) - first_token;
    out.limit = max(job.outputs, first_output) - first_output;
    out.at = p.y + (job.token_begin + first_token) * p.y_stride + job.slice_begin + job.first_output + first_output;
    for (u32 chunk = 0; chunk * kStep < job.outputs; ++chunk) {
        for (u32 block = 0; block * kStep < job.rank; ++block) {
            const SharedAddress y = next_slot();
            if (!multiplies) continue;
            if (block == 0) out.start(y);
            out.add(hidden + block * (kTokens * kStep * 2), y + kActivationBytes, job.rank - block * kStep);
        }
        if (live) out.store(chunk);
    }
}
