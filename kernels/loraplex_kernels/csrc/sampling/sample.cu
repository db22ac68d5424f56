// Draws one token per row: masks, constraints, penalties, temperature, min_p, top_k, top_p, then Gumbel-max with Philox noise.
//
//   x = penalize(constrain(mask(logits))); v = (x - max x) / temperature, -inf below log(min_p)
//   kept = the top_k likeliest of which the first make up top_p of the mass; token = argmax over kept of v + gumbel(word)
//
// Ties fall to the likelier token, then to the lower id. The choice is that of engine's torch sampler: the integers are
// the same, and exp, log and division are those that torch calls on a GPU. Rows are independent of each other. Reported
// log probabilities are those of x, before temperature. Rows whose maximum is not finite are marked invalid, those of
// which no token is left apart from those with NaN or an infinite maximum.
//
// Grid: one CTA per row. Block: THREADS, each taking every THREADS-th unit of 8 tokens. Passes over the row: 1 (maximum;
// all that a greedy row needs), + 1 per draw, or + 1 to list candidates of a truncated draw, which then stays in shared
// memory: the want-th best of the threads' maxima bounds the want-th best token from below. + 1 or 2 for reports.
// Shared memory: 8 bytes per list entry, CAPACITY of them, and 200 bytes. Rows start on 16 bytes if vocab % 8 == 0.
// Registers: 2 CTAs of 320 threads per SM, so that 256 rows are one wave on 132 SMs, hence at most 96.
// Architectures: sm_80 and up. Sources: Gumbel-max: Maddison et al., arXiv:1411.0030; top_p: Holtzman et al.,
// arXiv:1904.09751; min_p: Nguyen et al., arXiv:2407.01082; repetition penalty: Keskar et al., arXiv:1909.05858.
#include "sampling/philox.cuh"
#include "sampling/select.cuh"

constexpr int kWanted = 7 * kThreads / 8;  // candidates of a top_p row: about 2.1 kThreads tokens reach the list

struct Params {
    const elem* logits;     // [rows, stride]; tokens from vocab on cannot be drawn
    const SampleRow* rows;  // [rows]
    const Edit* edits;      // [edit rows, max_edits]
    const u8* edit_bits;    // [edit rows, ceil(stride / 8)]
    u16* counts;            // [count rows, stride]; the drawn token is counted
    const u8* masks;        // [mask rows, 4 ceil(vocab / 32)]
    int* drawn;             // [2, rows]: tokens, and what became of the draw, `kValid` or another
    int* last_sampled;      // [slots]
    int* report;            // [rows, 1 + 2 report_top]: log probability drawn, likeliest (fp32 bits), their ids
    int vocab;
    int max_edits;
    int report_top;
    int stride;  // a multiple of 8 wherever vocab is
};
static_assert(sizeof(Params) == 88, "params.py mirrors it");

constexpr int kNotFinite = 0, kValid = 1, kNothingLeft = 2;

struct Best {
    float own;  // largest logit of this thread
    float x;    // largest logit of the row
    int token;  // lowest id among equals
};

struct Choice {
    float value;
    u64 rank;  // the smaller rank wins among equals; the id is in its low bits
};
__device__ __forceinline__ void prefer(Choice& a, float value, u64 rank) {
    if (value > a.value || (value == a.value && rank < a.rank)) a = {value, rank};
}

__device__ __forceinline__ Best find_best() {
    const int vocab = shared.source.vocab;
    float best = negative_infinity();
    int token = min(static_cast<int>(threadIdx.x) * kUnit, vocab - 1);
    bool is_nan = false;
    each_unit([&](int base, const float (&x)[kUnit]) {
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
            if (base + j >= vocab) continue;
            is_nan |= x[j] != x[j];
            if (x[j] > best) best = x[j], token = base + j;
        }
    });
    const u64 least = block_min(is_nan ? static_cast<u64>(token) : key_of(~rising(best), token));
    return {best, from_rising(~order_of(least)), id_of(least)};
}

__device__ __forceinline__ u64 nucleus_bound(float top_p, u64 mass) {
    return static_cast<u64>(ceil(static_cast<double>(top_p) * static_cast<double>(mass)));
}
// An order that at least `want` tokens reach, as far as it follows from the best token of each thread.
__device__ __forceinline__ u32 order_reached(float own_best, int want) {
    const bool has_units = threadIdx.x * kUnit < shared.source.vocab;
    return kth_smallest(has_units ? shared.ranking.order(own_best) : 0xffffffffu, want);
}

struct Kept {
    u64 limit;   // keys up to it can be drawn
    int listed;  // how many entries of the sorted list they are; 0: not listed
};
constexpr u64 kEnd = static_cast<u64>(kImpossible) << kIdBits;  // keys from here on cannot be drawn

__device__ __forceinline__ Kept truncate(float own_best) {
    const SampleRow& row = shared.row;
    const int top_k = row.top_k < shared.source.vocab ? max(row.top_k, 0) : 0;
    const bool has_nucleus = row.top_p < 1.f;
    if (!top_k && !has_nucleus) return {kEnd - 1, 0};
    const u32 order = order_reached(own_best, top_k && top_k < kWanted ? top_k : kWanted);
    const bool is_complete = order >= kImpossible;
    const int n = gather(0, is_complete ? kEnd : key_of(order + 1, 0));
    if (n <= kCapacity && (is_complete || !top_k || n >= top_k)) {
        sort_list(n);
        int kept = top_k ? min(top_k, n) : n;
        bool is_open = false;
        if (has_nucleus) {
            u64 own = 0;
            for (int i = threadIdx.x; i < kept; i += kThreads) own += weight_of(shared.list[i]);
            const u64 listed = block_sum(own);
            // After top_k, only the tokens it kept count; without top_k, the mass is that of the whole vocabulary.
            const u64 bound = nucleus_bound(row.top_p, top_k || is_complete ? listed : mass_up_to(kEnd - 1));
            is_open = listed < bound;
            kept = count_below(kept, true, 0, bound);
        }
        if (!is_open) return {shared.list[kept - 1], kept};
    }
    u64 limit = top_k ? narrow(false, top_k, kEnd) : kEnd - 1;
    if (has_nucleus) limit = narrow(true, nucleus_bound(row.top_p, mass_up_to(limit)), limit + 1);
    return {limit, 0};
}

__device__ __forceinline__ Choice choose_listed(int count) {
    const SampleRow& row = shared.row;
    Choice choice = {negative_infinity(), kNoKey};
    for (int i = threadIdx.x; i < count; i += kThreads) {
        const u64 key = shared.list[i];
        const Words words = philox4x32(id_of(key) / kLanes, row.position, row.seed_low, row.seed_high);
        const int lane = id_of(key) % kLanes;
        const u32 word = lane < 2 ? (lane ? words.w[1] : words.w[0]) : (lane == 2 ? words.w[2] : words.w[3]);
        prefer(choice, value_of(key) + gumbel_of(uniform_of(word)), key);
    }
    return choice;
}

__device__ __forceinline__ Choice choose_up_to(u64 limit) {
    const Ranking ranking = shared.ranking;
    const u32 position = shared.row.position, seed_low = shared.row.seed_low, seed_high = shared.row.seed_high;
    const bool is_truncated = limit != kEnd - 1;
    Choice choice = {negative_infinity(), kNoKey};
    each_unit([&](int base, const float (&x)[kUnit]) {
        float values[kUnit], largest = negative_infinity();
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
            const u64 key = ranking.key(x[j], base + j);
            values[j] = key <= limit ? value_of(key) : negative_infinity();
            largest = fmaxf(largest, values[j]);
        }
        if (largest == negative_infinity() || largest + kMaxGumbel < choice.value) return;
#pragma unroll
        for (int half = 0; half < kUnit / kLanes; ++half) {
            const Words words = philox4x32(base / kLanes + half, position, seed_low, seed_high);
#pragma unroll
            for (int lane = 0; lane < kLanes; ++lane) {
                const float value = values[half * kLanes + lane], uniform = uniform_of(words.w[lane]);
                // gumbel <= -log(u), so beyond this u the token loses by 1e-3 at least: no logarithms for most.
                if (value == negative_infinity() || uniform > __expf(value - choice.value) * 1.002f) continue;
                const int id = base + half * kLanes + lane;
                const u64 rank = is_truncated ? key_of(order_of_value(value), id) : static_cast<u64>(id);
                prefer(choice, value + gumbel_of(uniform), rank);
            }
        }
    });
    return choice;
}

__device__ __forceinline__ int draw(const Best& best) {
    const SampleRow& row = shared.row;
    const float least = row.min_p > 0.f ? logf(row.min_p) : negative_infinity();
    if (threadIdx.x == 0) shared.ranking = {shared.source.vocab, false, best.x, row.temperature, least};
    __syncthreads();
    const Kept kept = truncate(best.own);
    const Choice choice = kept.listed ? choose_listed(kept.listed) : choose_up_to(kept.limit);
    const u64 least_order = block_min(~rising(choice.value));
    const bool is_winner = static_cast<u64>(~rising(choice.value)) == least_order;
    return id_of(block_min(is_winner ? choice.rank : kNoKey));
}

// Writes the likeliest tokens; returns the logarithm of the sum of exp(x - best).
__device__ __forceinline__ float report_likeliest(const Best best, int* report, int width) {
    const int vocab = shared.source.vocab, wanted = min(min(shared.row.num_top, width), vocab);
    if (threadIdx.x == 0) shared.ranking = {vocab, true, best.x, 1.f, negative_infinity()};
    float own = 0.f;
    each_unit([&](int base, const float (&x)[kUnit]) {
#pragma unroll
        for (int j = 0; j < kUnit; ++j)
            if (base + j < vocab) own += expf(x[j] - best.x);
    });
    const float log_sum = logf(block_sum<kThreads>(own, reinterpret_cast<float*>(shared.scratch)));
    if (wanted <= 0) return log_sum;
    const u64 end = key_of(0xffffffffu, 0);
    const u32 order = order_reached(best.own, wanted);
    int n = gather(0, order == 0xffffffffu ? end : key_of(order + 1, 0));
    if (n > kCapacity || n < wanted) n = gather(0, narrow(false, wanted, end) + 1);
    sort_list(n);
    for (int i = threadIdx.x; i < wanted; i += kThreads) {
        const u64 key = shared.list[i];
        report[1 + i] = __float_as_int(from_rising(~order_of(key)) - best.x - log_sum);
        report[1 + width + i] = id_of(key);
    }
    __syncthreads();
    return log_sum;
}

__device__ __forceinline__ void set_up(const Params& p) {
    const SampleRow& row = shared.row;
    const i64 at = blockIdx.x;
    Source s = {p.logits + at * p.stride, nullptr, nullptr, nullptr, nullptr, p.vocab, 0, false, false};
    if (row.mask_row >= 0) s.mask = p.masks + static_cast<i64>(row.mask_row) * ((p.vocab + 31) / 32 * 4);
    if (row.edit_row >= 0) {
        s.bits = p.edit_bits + static_cast<i64>(row.edit_row) * ((p.stride + kUnit - 1) / kUnit);
        s.edits = p.edits + static_cast<i64>(row.edit_row) * p.max_edits;
        s.num_edits = abs(row.num_edits);
        s.only_edited = row.num_edits < 0;
    }
    if (row.count_row >= 0) s.counts = p.counts + static_cast<i64>(row.count_row) * p.stride;
    s.is_special = s.bits || s.counts;
    shared.source = s;
}

extern "C" __global__ void __launch_bounds__(kThreads, 2) sample(const Params p) {
    allow_dependents();
    dependency_wait();
    if (threadIdx.x == 0) {
        shared.row = p.rows[blockIdx.x];
        set_up(p);
    }
    __syncthreads();
    const Best best = find_best();
    const bool is_valid = fabsf(best.x) < __uint_as_float(kImpossible);
    const int num_top = shared.row.num_top;
    int* report = p.report + static_cast<i64>(blockIdx.x) * (1 + 2 * p.report_top);
    int token = best.token;
    float log_sum = 0.f;
    if (is_valid && num_top >= 0) log_sum = report_likeliest(best, report, p.report_top);
    if (is_valid && shared.row.temperature > 0.f) token = draw(best);
    if (threadIdx.x != 0) return;
    const Source& s = shared.source;
    if (is_valid && num_top >= 0) {
        const float x = to_float(as_global(s.logits)[token]);
        const float logit = s.is_special ? special_logit(s, shared.row, x, token) : x;
        report[0] = __float_as_int(logit - best.x - log_sum);
    }
    p.drawn[blockIdx.x] = token;
    p.drawn[gridDim.x + blockIdx.x] = is_valid ? kValid : best.x == negative_infinity() ? kNothingLeft : kNotFinite;
    p.last_sampled[shared.row.slot] = token;
    if (!s.counts) return;
    u16& count = as_global(s.counts)[token];
    if ((count & kMostCounted) != kMostCounted) ++count;
}
