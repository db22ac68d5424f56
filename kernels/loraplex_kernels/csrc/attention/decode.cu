// out = softmax(scale * q K^T) V for one new token per sequence over paged bf16 K and V (grouped and multi-head).
//
// Grid: (splits, kv_heads * ceil(group / 8), sequences). Block: 4 warps; a CTA serves up to 8 query heads of one KV head
// over its share of the context, its warps every fourth run of 16 tokens. A lane's 16-byte loads of K and V are mma
// fragments as they arrive (K's because the order of k is free, V's after movmatrix), so nothing is staged in shared
// memory: scores^T = K q^T with tokens as M and heads as N, out^T = V^T p^T with dims as M. 16 loads in flight per lane.
// Long contexts are split; the last CTA of a unit to arrive sums the shares in split order (no float atomics).
// Shared memory: 128 x HEAD_DIM + 260 bytes. Alignment: HEAD_DIM rows on 16 bytes.
// Registers: 4 CTAs of 128 threads per SM keep 128 KiB of loads in flight, hence at most 128. Heads of 256 take twice as
// many of both: 2 CTAs. Heads of 80 leave half of their last fragment empty.
// Architectures: sm_80 and up. Sources: Dao, arXiv:2307.08691 (FlashAttention-2); Hong et al., arXiv:2311.01282 (split-K).
#include "attention/paged_kv.cuh"

constexpr int kWarps = 4;
constexpr int kHeads = 8;    // query heads per CTA: the N of mma.m16n8k16
constexpr int kTokens = 16;  // tokens of a warp in a round
constexpr int kBlocks = (kHeadDim + 31) / 32;
constexpr int kCtas = kHeadDim > 128 ? 2 : 4;  // per SM; attention/decode.py counts a wave with it

struct Params {
    PagedKv kv;
    const elem* q;            // [sequences, q_stride]: heads first
    elem* out;                // [sequences, num_heads * HEAD_DIM]
    const int* context_lens;  // [sequences] tokens seen, the new one included; 0: row of padding, out is zeroed
    float* partial_out;       // [units][splits][8][HEAD_DIM]
    float* partial_stats;     // [units][splits][8][2]: maximum (base 2), sum
    int* arrivals;            // [units], zero between launches
    i64 q_stride;
    int min_split;  // tokens a split is worth, a multiple of 64
    int reserved;
};
static_assert(sizeof(Params) == 120, "params.py mirrors it");

struct Shared {
    float out[kWarps][kHeads][kHeadDim];
    float peak[kWarps][kHeads];
    float sum[kWarps][kHeads];
    int is_last;
};

// Whether the eight dims 32 b + 8 c are part of a head.
__device__ __forceinline__ bool has_dims(int b, int c) { return kHeadDim % 32 == 0 || 32 * b + 8 * c < kHeadDim; }

// Eight neighbouring dims of one token as they are in the pool, and as four registers of bf16 pairs: x, y, z, w hold dims
// (0, 1), (2, 3), (4, 5), (6, 7); of e4m3 (0, 2), (1, 3), (4, 6), (5, 7), which needs no further instruction.
#ifdef KV_SCALES
using Raw = Pair;
__device__ __forceinline__ Raw load_raw(const u8* from) { return load_weights8(from); }
__device__ __forceinline__ Quad widened(const Raw& raw, u32 multiplier) {
    Quad quad;
    widen4(raw.x, multiplier, quad.x, quad.y);
    widen4(raw.y, multiplier, quad.z, quad.w);
    return quad;
}
__device__ __forceinline__ Quad ordered(const Quad& q) {
    return {q.x & 0xffffu | q.y << 16, q.x >> 16 | q.y & 0xffff0000u, q.z & 0xffffu | q.w << 16, q.z >> 16 | q.w & 0xffff0000u};
}
__device__ __forceinline__ int dim_of(int pair, int half) { return pair / 2 * 4 + pair % 2 + 2 * half; }
#else
using Raw = Quad;
__device__ __forceinline__ Raw load_raw(const elem* from) { return load_weights16(reinterpret_cast<const u8*>(from)); }
__device__ __forceinline__ Quad widened(const Raw& raw, u32) { return raw; }
__device__ __forceinline__ Quad ordered(const Quad& q) { return q; }
__device__ __forceinline__ int dim_of(int pair, int half) { return 2 * pair + half; }
#endif

// Running softmax over the tokens a warp has seen. Lane (g, c) holds heads 2c and 2c + 1; out[b][half][i] is dim
// 32 b + 8 (g / 2) + dim_of(2 half + i / 2, g % 2) of head 2c + i % 2.
struct State {
    float out[kBlocks][2][4];
    float peak[2];
    float sum[2];
};

__device__ __forceinline__ void accumulate(const Raw (&k_raw)[2][kBlocks], const Raw (&v_raw)[2][kBlocks],
                                           const u32 (&multipliers)[4], const Quad (&q)[kBlocks], bool live0, bool live1,
                                           float scale, State& state) {
    float s[4] = {};
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
        const Quad k[2] = {widened(k_raw[0][b], multipliers[0]), widened(k_raw[1][b], multipliers[1])};
        mma_bf16(s, k[0].x, k[1].x, k[0].y, k[1].y, q[b].x, q[b].y);
        mma_bf16(s, k[0].z, k[1].z, k[0].w, k[1].w, q[b].z, q[b].w);
    }
    float p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = (i < 2 ? live0 : live1) ? exponent(s[i], scale) : negative_infinity();
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float peak = fmaxf(p[h], p[h + 2]);
#pragma unroll
        for (int mask = 4; mask < kWarp; mask <<= 1) peak = fmaxf(peak, __shfl_xor_sync(kFullMask, peak, mask));
        peak = fmaxf(peak, state.peak[h]);
        const float base = peak == negative_infinity() ? 0.f : peak;
        shrink[h] = exp2f(state.peak[h] - base);
        state.peak[h] = peak;
        p[h] = exp2f(p[h] - base);
        p[h + 2] = exp2f(p[h + 2] - base);
        state.sum[h] = state.sum[h] * shrink[h] + p[h] + p[h + 2];
    }
    const u32 p0 = transpose_8x8(pack_bf16(p[0], p[1])), p1 = transpose_8x8(pack_bf16(p[2], p[3]));
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
        const Quad v[2] = {widened(v_raw[0][b], multipliers[2]), widened(v_raw[1][b], multipliers[3])};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float (&o)[4] = state.out[b][half];
#pragma unroll
            for (int i = 0; i < 4; ++i) o[i] *= shrink[i % 2];
            const u32 a0 = transpose_8x8(half ? v[0].z : v[0].x), a1 = transpose_8x8(half ? v[0].w : v[0].y);
            const u32 a2 = transpose_8x8(half ? v[1].z : v[1].x), a3 = transpose_8x8(half ? v[1].w : v[1].y);
            mma_bf16(o, a0, a1, a2, a3, p0, p1);
        }
    }
}

__device__ __forceinline__ void store_state(State& state, int warp, int g, int c, Shared& shared) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int mask = 4; mask < kWarp; mask <<= 1) state.sum[h] += __shfl_xor_sync(kFullMask, state.sum[h], mask);
        if (g == 0) {
            shared.peak[warp][2 * c + h] = state.peak[h];
            shared.sum[warp][2 * c + h] = state.sum[h];
        }
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int dim = 32 * b + 8 * (g / 2) + dim_of(i / 2, g % 2);
            if (!has_dims(b, g / 2)) continue;
            shared.out[warp][2 * c + i % 2][dim] = state.out[b][i / 4][i % 4];
        }
}

// Merges `count` shares of one output element in order.
template <class Peak, class Sum, class Out>
__device__ __forceinline__ void merge(int count, Peak peak_of, Sum sum_of, Out out_of, float& peak, float& sum, float& out) {
    peak = negative_infinity();
    for (int i = 0; i < count; ++i) peak = fmaxf(peak, peak_of(i));
    const float base = peak == negative_infinity() ? 0.f : peak;
    sum = out = 0.f;
    for (int i = 0; i < count; ++i) {
        const float weight = exp2f(peak_of(i) - base);
        sum += weight * sum_of(i);
        out += weight * out_of(i);
    }
}

extern "C" __global__ void __launch_bounds__(kWarps * kWarp, kCtas) attention_decode(const Params p) {
    __shared__ Shared shared;
    allow_dependents();
    dependency_wait();
    const int sequence = blockIdx.z, splits = gridDim.x, group = p.kv.num_heads / p.kv.num_kv_heads;
    const int kv_head = blockIdx.y % p.kv.num_kv_heads, first = blockIdx.y / p.kv.num_kv_heads * kHeads;
    const int heads = min(kHeads, group - first);
    const int end = p.context_lens[sequence], begin = p.kv.window > 0 ? max(0, end - p.kv.window) : 0;
    const int origin = begin / kTokens * kTokens;
    const int share = max(p.min_split, ((end - origin + splits - 1) / splits + 63) / 64 * 64);
    const int used = max(1, (end - origin + share - 1) / share);
    if (static_cast<int>(blockIdx.x) >= used) return;

    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
    Quad q[kBlocks];
    const elem* q_row = p.q + sequence * p.q_stride + (kv_head * group + first + g) * kHeadDim + 8 * c;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
        q[b] = Quad{};
        if (g < heads && has_dims(b, c)) q[b] = ordered(*reinterpret_cast<const Quad*>(q_row + 32 * b));
    }
    State state = {};
    state.peak[0] = state.peak[1] = negative_infinity();
    const i64 plane = kv_plane(p.kv);
    const float scale = exponent_scale(p.kv);
    const int stop = min(end, origin + (static_cast<int>(blockIdx.x) + 1) * share);
    for (int t = origin + blockIdx.x * share + warp * kTokens; t < stop; t += kWarps * kTokens) {
        Raw k[2][kBlocks], v[2][kBlocks];
        u32 multipliers[4] = {};  // of K, then V, of the two tokens; of no use but for FP8
        bool live[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = t + g + 8 * i;
            live[i] = token >= begin && token < stop;
            const kv_elem* from = nullptr;
            if (live[i]) {
                const int page = page_of(p.kv, sequence, token);
                from = key_address(p.kv, page, kv_head, token) + 8 * c;
#ifdef KV_SCALES
                const u32 scales = *scale_address(p.kv, page, kv_head, token);
                multipliers[i] = multiplier_of(scales & 0xffffu), multipliers[2 + i] = multiplier_of(scales >> 16);
#endif
            }
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                k[i][b] = v[i][b] = Raw{};
                if (live[i] && has_dims(b, c)) {
                    k[i][b] = load_raw(from + 32 * b);
                    v[i][b] = load_raw(from + plane + 32 * b);
                }
            }
        }
        accumulate(k, v, multipliers, q, live[0], live[1], scale, state);
    }
    store_state(state, warp, g, c, shared);
    __syncthreads();

    const i64 unit = static_cast<i64>(sequence) * gridDim.y + blockIdx.y;
    elem* out_row = p.out + (static_cast<i64>(sequence) * p.kv.num_heads + kv_head * group + first) * kHeadDim;
    for (int i = threadIdx.x; i < heads * kHeadDim; i += kWarps * kWarp) {
        const int head = i / kHeadDim, dim = i % kHeadDim;
        float peak, sum, out;
        merge(
            kWarps, [&](int w) { return shared.peak[w][head]; }, [&](int w) { return shared.sum[w][head]; },
            [&](int w) { return shared.out[w][head][dim]; }, peak, sum, out);
        if (used == 1) {
            out_row[i] = from_float<elem>(sum == 0.f ? 0.f : out / sum);
        } else {
            const i64 at = (unit * splits + blockIdx.x) * kHeads + head;
            p.partial_out[at * kHeadDim + dim] = out;
            if (dim == 0) {
                p.partial_stats[2 * at] = peak;
                p.partial_stats[2 * at + 1] = sum;
            }
        }
    }
    if (used == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        const int arrived = atomicAdd(p.arrivals + unit, 1);
        shared.is_last = arrived == used - 1;
        if (shared.is_last) p.arrivals[unit] = 0;
    }
    __syncthreads();
    if (!shared.is_last) return;
    __threadfence();
    for (int i = threadIdx.x; i < heads * kHeadDim; i += kWarps * kWarp) {
        const int head = i / kHeadDim, dim = i % kHeadDim;
        const auto at = [&](int split) { return (unit * splits + split) * kHeads + head; };
        float peak, sum, out;
        merge(
            used, [&](int s) { return __ldcg(p.partial_stats + 2 * at(s)); },
            [&](int s) { return __ldcg(p.partial_stats + 2 * at(s) + 1); },
            [&](int s) { return __ldcg(p.partial_out + at(s) * kHeadDim + dim); }, peak, sum, out);
        out_row[i] = from_float<elem>(sum == 0.f ? 0.f : out / sum);
    }
}
