// out = softmax(scale * q K^T) V for one new token per sequence over paged K and V of bf16 or e4m3 (grouped and multi-head).
//
// Grid: (splits, kv_heads * ceil(group / 8), sequences). Block: 4 warps; a CTA serves up to 8 query heads of one KV head
// over its share of the context, its warps every fourth run of 16 tokens. Loads of K and V are mma fragments as they arrive, or
// once they are widened, so nothing is staged in shared memory: scores^T = K q^T with tokens as M and heads as N, out^T = V^T p^T with dims as M. 16 loads in flight per lane.
// Long contexts are split; the last CTA of a unit to arrive sums the shares in split order (no float atomics).
// Shared memory: 128 x HEAD_DIM + 260 bytes. Alignment: rows of q, K and V on 16 bytes.
// Registers: 4 CTAs of 128 threads per SM keep 128 KiB of loads in flight, hence at most 128. Heads of 256 take twice as
// many of both: 2 CTAs. Heads of 80 leave half of their last fragment empty.
// Architectures: sm_80 and up. Sources: Dao, arXiv:2307.08691 (FlashAttention-2); Hong et al., arXiv:2311.01282 (split-K).
#ifdef KV_SCALES
#include "attention/decode_fp8.cuh"
#else
#include "attention/decode_bf16.cuh"
#endif

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
            const int dim = first_dim(b, g / 2) + dim_of(i / 2, g % 2);
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
    const elem* q_row = p.q + sequence * p.q_stride + (kv_head * group + first + g) * kHeadDim;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
        q[b] = Quad{};
        if (g < heads && has_dims(b, c)) q[b] = ordered(*reinterpret_cast<const Quad*>(q_row + first_dim(b, c)));
    }
    State state = {};
    state.peak[0] = state.peak[1] = negative_infinity();
    const int first_token = origin + blockIdx.x * share + warp * kTokens;
    const int stop = min(end, origin + (static_cast<int>(blockIdx.x) + 1) * share);
    attend(Share{p.kv, sequence, kv_head, begin, first_token, stop, exponent_scale(p.kv)}, q, g, c, state);
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
