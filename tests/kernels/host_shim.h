// Runs a CUDA kernel on a CPU: one fiber per thread of a block or cluster, clusters one after another. Enough of CUDA for
// the kernels that use no tensor cores, and of tensor cores, asynchronous copies and clusters for LoRA at prefill; built
// with address and undefined-behaviour sanitizers, so that an index that strays is found.
#pragma once
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define LORAPLEX_HOST 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

namespace shim {
struct Index {
    unsigned x = 0, y = 0, z = 0;
};
#ifdef CLUSTER
constexpr unsigned kCluster = CLUSTER;
constexpr size_t kStackBytes = 64 * 1024;
#else
constexpr unsigned kCluster = 1;
constexpr size_t kStackBytes = 256 * 1024;
#endif
struct Barrier {
    unsigned arrived = 0, generation = 0;
};
struct Copy {
    void* to;
    const void* from;
    bool live, early;
    size_t bytes = 16;
};
#ifdef __x86_64__
// swapcontext keeps the mask of signals by a system call, which costs more than most of what runs between two barriers.
using Context = void*;  // the stack pointer, below the registers that a called function preserves
extern "C" void shim_switch(Context* from, Context to) noexcept;
asm(".pushsection .text\n.type shim_switch, @function\nshim_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n.popsection");
inline void switch_to(Context& from, Context& to) { shim_switch(&from, to); }
inline void start_at(Context& context, void* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + kStackBytes) - 1;  // aligned as after a call
    *top = nullptr, *--top = reinterpret_cast<void*>(entry);
    context = top - 6;
}
#else
using Context = ucontext_t;
inline void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
inline void start_at(Context& context, void* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = kStackBytes, context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
#endif
struct Fiber {
    std::vector<std::vector<Copy>> copies;  // by group; the last is open
    unsigned cluster_generation = 0;
    Context context;
    void* stack = nullptr;
    const Barrier* waits_at = nullptr;  // with `waits_for` arrivals, for another generation than this
    const unsigned* waits_for = nullptr;
    unsigned generation = 0;
    bool done = false;
    void* fake_stack = nullptr;
};
inline Index block_index, grid_size;
inline unsigned block_size, live;  // live: fibers of the cluster
inline std::vector<Fiber> fibers;
inline unsigned current;
inline Context scheduler;
inline void* scheduler_fake;
inline const void* scheduler_bottom;
inline size_t scheduler_size;
inline Barrier block_barriers[kCluster], cluster_barrier;
inline unsigned block_live[kCluster];
inline std::vector<Barrier> warp_barriers;
inline std::vector<unsigned> warp_live;
inline std::vector<unsigned long long> slots;
inline std::vector<std::array<unsigned long long, 6>> wide_slots;
inline void (*body)();
inline unsigned long progress;

inline void yield() {
    Fiber& self = fibers[current];
    __sanitizer_start_switch_fiber(&self.fake_stack, scheduler_bottom, scheduler_size);
    switch_to(self.context, scheduler);
    __sanitizer_finish_switch_fiber(self.fake_stack, &scheduler_bottom, &scheduler_size);
}
inline void wait(Barrier& barrier, const unsigned& expected) {
    const unsigned generation = barrier.generation;
    ++barrier.arrived, ++progress;
    while (barrier.generation == generation) {
        if (barrier.arrived >= expected) {
            barrier.arrived = 0;
            ++barrier.generation, ++progress;
            break;
        }
        Fiber& self = fibers[current];
        self.waits_at = &barrier, self.waits_for = &expected, self.generation = generation;
        yield();
        self.waits_at = nullptr;
    }
}
inline bool waits_in_vain(const Fiber& f) {
    return f.waits_at && f.waits_at->generation == f.generation && f.waits_at->arrived < *f.waits_for;
}
inline void enter() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
    body();
    Fiber& self = fibers[current];
    self.done = true;
    --live, --warp_live[current / 32], --block_live[current / block_size], ++progress;
    __sanitizer_start_switch_fiber(nullptr, scheduler_bottom, scheduler_size);
    switch_to(self.context, scheduler);
}
// Pages of a mapping cost nothing until they are touched, and most of a stack is not.
inline void* make_stack() {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) std::exit(8);
    return stack;
}
inline void run_block() {
    const unsigned threads = block_size * kCluster;
    live = threads;
    cluster_barrier = {};
    for (unsigned cta = 0; cta < kCluster; ++cta) block_barriers[cta] = {}, block_live[cta] = block_size;
    warp_barriers.assign((threads + 31) / 32, {});
    warp_live.assign((threads + 31) / 32, 0);
    slots.assign(threads, 0);
    wide_slots.assign(threads, {});
    fibers.resize(threads);
    for (unsigned t = 0; t < threads; ++t) {
        Fiber& f = fibers[t];
        if (f.stack == nullptr) f.stack = make_stack();
        f.done = false, f.waits_at = nullptr, f.fake_stack = nullptr;
        f.copies.assign(1, {}), f.cluster_generation = 0;
        ++warp_live[t / 32];
        start_at(f.context, f.stack, enter);
    }
    while (live) {
        const unsigned long before = progress;
        for (current = 0; current < threads; ++current) {
            Fiber& f = fibers[current];
            if (f.done || waits_in_vain(f)) continue;
            __sanitizer_start_switch_fiber(&scheduler_fake, f.stack, kStackBytes);
            switch_to(scheduler, f.context);
            __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
        }
        if (progress == before) {
            std::fprintf(stderr, "deadlock: %u threads wait at a barrier others never reach\n", live);
            std::exit(3);
        }
    }
}
inline unsigned cta() { return current / block_size; }
template <class T>
inline T exchange(T value, unsigned from) {
    static_assert(sizeof(T) <= 8, "one slot");
    const unsigned warp = current / 32;
    std::memcpy(&slots[current], &value, sizeof(T));
    wait(warp_barriers[warp], warp_live[warp]);
    T out;
    std::memcpy(&out, &slots[warp * 32 + from % 32], sizeof(T));
    wait(warp_barriers[warp], warp_live[warp]);
    return out;
}
// What each lane of the warp put; every lane gets all.
using Lanes = std::array<std::array<unsigned long long, 6>, 32>;
inline Lanes exchange(const std::array<unsigned long long, 6>& value) {
    const unsigned warp = current / 32;
    wide_slots[current] = value;
    wait(warp_barriers[warp], warp_live[warp]);
    Lanes lanes;
    for (unsigned lane = 0; lane < 32; ++lane) lanes[lane] = wide_slots[warp * 32 + lane];
    wait(warp_barriers[warp], warp_live[warp]);
    return lanes;
}
// Shared memory of the CTA, poisoned with NaN.
inline char* shared_base;
inline size_t shared_stride;
template <class T>
T& shared_memory() {
    alignas(128) static char bytes[kCluster][(sizeof(T) + 127) / 128 * 128];
    if (shared_base == nullptr) {
        std::memset(bytes, 0xff, sizeof(bytes));
        shared_base = bytes[0], shared_stride = sizeof(bytes[0]);
    }
    return *reinterpret_cast<T*>(bytes[cta()]);
}
inline void perform(const Copy& copy) {
    if (copy.live) {
        std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
        std::memset(copy.to, 0, copy.bytes);
    }
}
inline unsigned coin = 1;  // asynchronous copies happen at once or as late as they may, in a fixed random order
inline bool flip() { return (coin = coin * 1664525u + 1013904223u) >> 31; }
}  // namespace shim

#define threadIdx (shim::Index{shim::current % shim::block_size, 0, 0})
#define blockIdx (shim::Index{shim::block_index.x + shim::cta(), shim::block_index.y, shim::block_index.z})
#define gridDim shim::grid_size
inline void __syncthreads() { shim::wait(shim::block_barriers[shim::cta()], shim::block_live[shim::cta()]); }
inline void __syncwarp() { shim::wait(shim::warp_barriers[shim::current / 32], shim::warp_live[shim::current / 32]); }
template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    return shim::exchange(value, shim::current % 32 ^ mask);
}
template <class T>
inline T __shfl_sync(unsigned, T value, int from) {
    return shim::exchange(value, from);
}
template <class T>
inline T __shfl_up_sync(unsigned, T value, unsigned delta) {
    const unsigned lane = shim::current % 32;
    return shim::exchange(value, lane >= delta ? lane - delta : lane);
}
inline int __syncthreads_count(int predicate) {
    shim::slots[shim::current] = predicate != 0;
    __syncthreads();
    int count = 0;
    for (unsigned t = 0; t < shim::block_size; ++t) count += static_cast<int>(shim::slots[t]);
    __syncthreads();
    return count;
}
template <class T>
inline T atomicAdd(T* to, T value) {  // fibers change only at barriers
    const T old = *to;
    *to += value;
    return old;
}
inline void __threadfence() {}
template <class T>
inline T __ldcg(const T* from) {
    return *from;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(1ull * a * b >> 32); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float_as_int(float v) {
    int i;
    std::memcpy(&i, &v, 4);
    return i;
}
inline float __uint_as_float(unsigned v) {
    float f;
    std::memcpy(&f, &v, 4);
    return f;
}
inline unsigned __float_as_uint(float v) {
    unsigned u;
    std::memcpy(&u, &v, 4);
    return u;
}
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
inline float __expf(float v) { return std::exp(v); }
template <class T>
inline T max(T a, T b) {
    return a < b ? b : a;
}
template <class T>
inline T min(T a, T b) {
    return b < a ? b : a;
}

// Tensor cores and asynchronous copies: common.cuh's primitives, then lora/prefill.cuh's.
inline bool __any_sync(unsigned, bool value) {
    for (const auto& lane : shim::exchange({value}))
        if (lane[0]) return true;
    return false;
}
inline unsigned __reduce_max_sync(unsigned lanes, unsigned value) {
    const shim::Lanes all = shim::exchange({value});
    unsigned most = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (lanes >> lane & 1) most = most < all[lane][0] ? static_cast<unsigned>(all[lane][0]) : most;
    return most;
}
inline float reciprocal_approx(float v) { return 1.f / v; }
inline float exp2_approx(float v) { return std::exp2(v); }
using SharedAddress = unsigned char*;
inline SharedAddress address_of(const void* p) { return static_cast<unsigned char*>(const_cast<void*>(p)); }
template <class Shared>
unsigned char* generic_address(Shared&, SharedAddress at) {
    return at;
}
inline void copy_async(void* to, const void* from, bool live, size_t bytes) {
    if (reinterpret_cast<size_t>(to) % bytes || (live && reinterpret_cast<size_t>(from) % bytes)) std::exit(7);
    const shim::Copy copy{to, from, live, shim::flip(), bytes};
    if (copy.early) shim::perform(copy);
    shim::fibers[shim::current].copies.back().push_back(copy);
}
inline void copy_async16(void* to, const void* from, bool live) { copy_async(to, from, live, 16); }
inline void copy_async4(void* to, const void* from, bool live) { copy_async(to, from, live, 4); }
inline void copy_async16_if(SharedAddress to, const void* from, unsigned bytes, bool live) {
    if (live) copy_async16(to, from, bytes != 0);
}
inline void copy_async_commit() { shim::fibers[shim::current].copies.emplace_back(); }
template <int kPending>
void copy_async_wait() {
    auto& groups = shim::fibers[shim::current].copies;
    while (groups.size() > kPending + 1) {
        for (const shim::Copy& copy : groups.front())
            if (!copy.early) shim::perform(copy);
        groups.erase(groups.begin());
    }
}
inline void ldmatrix_x4(unsigned (&r)[4], const void* row) {
    if (reinterpret_cast<size_t>(row) % 16) std::exit(7);
    const unsigned lane = shim::current % 32;
    const shim::Lanes lanes = shim::exchange({reinterpret_cast<size_t>(row)});
    for (unsigned i = 0; i < 4; ++i)
        std::memcpy(&r[i], reinterpret_cast<const char*>(lanes[i * 8 + lane / 4][0]) + lane % 4 * 4, 4);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
    if (reinterpret_cast<size_t>(row) % 16) std::exit(7);
    const unsigned lane = shim::current % 32;
    const shim::Lanes lanes = shim::exchange({reinterpret_cast<size_t>(row)});
    for (unsigned i = 0; i < 4; ++i)
        for (unsigned half = 0; half < 2; ++half)
            std::memcpy(reinterpret_cast<char*>(&r[i]) + half * 2,
                        reinterpret_cast<const char*>(lanes[i * 8 + lane % 4 * 2 + half][0]) + lane / 4 * 2, 2);
}
inline unsigned transpose_8x8(unsigned fragment) {
    const unsigned lane = shim::current % 32;
    const shim::Lanes lanes = shim::exchange({fragment});
    const auto element = [&](unsigned row, unsigned column) {
        return static_cast<unsigned>(lanes[row * 4 + column / 2][0]) >> column % 2 * 16 & 0xffffu;
    };
    return element(lane % 4 * 2, lane / 4) | element(lane % 4 * 2 + 1, lane / 4) << 16;
}
inline void load_matrices(unsigned (&r)[4], SharedAddress row) { ldmatrix_x4(r, row); }
inline float bf16_of(unsigned long long pair, unsigned i) { return __uint_as_float(i ? pair & 0xffff0000u : pair << 16); }
inline void mma_bf16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    const unsigned lane = shim::current % 32;
    const shim::Lanes lanes = shim::exchange({a0, a1, a2, a3, b0, b1});
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; ++k)
            d[i] += bf16_of(lanes[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2) *
                    bf16_of(lanes[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
    }
}
struct AnyQuad {
    SharedAddress from;
    template <class Q>
    operator Q() const {
        return *reinterpret_cast<const Q*>(from);
    }
};
inline AnyQuad load_shared16(SharedAddress from) { return {from}; }
template <class Q>
void store_global16_if(void* to, const Q& q, bool live) {
    if (live) *static_cast<Q*>(to) = q;
}
template <unsigned kCluster>
unsigned cluster_rank() {
    return shim::cta();
}
template <unsigned kCluster>
void cluster_arrive() {
    if (kCluster == 1) return;
    shim::fibers[shim::current].cluster_generation = shim::cluster_barrier.generation;
    ++shim::progress;
    if (++shim::cluster_barrier.arrived == shim::block_size * kCluster)
        shim::cluster_barrier.arrived = 0, ++shim::cluster_barrier.generation;
}
template <unsigned kCluster>
void cluster_wait() {
    if (kCluster == 1) return __syncthreads();
    while (shim::cluster_barrier.generation == shim::fibers[shim::current].cluster_generation) shim::yield();
    ++shim::progress;
}
// The CTA's place of what is at `here` in this one's shared memory.
template <unsigned kCluster, class T>
T* of_peer(SharedAddress here, unsigned cta) {
    const size_t offset = reinterpret_cast<char*>(here) - shim::shared_base - shim::cta() * shim::shared_stride;
    if (offset + sizeof(T) > shim::shared_stride || offset % sizeof(T) || cta >= kCluster) std::exit(7);
    return reinterpret_cast<T*>(shim::shared_base + cta * shim::shared_stride + offset);
}
// An mbarrier of one phase is the number of bytes still to come: too many end the run at once, too few in a deadlock.
template <unsigned kCluster>
void expect_bytes(SharedAddress landed, unsigned bytes) {
    *of_peer<kCluster, size_t>(landed, shim::cta()) = bytes;
}
inline void reveal_expected() {}
template <unsigned kCluster>
void await_bytes(SharedAddress landed) {
    if (kCluster == 1) return __syncthreads();
    while (*of_peer<kCluster, volatile size_t>(landed, shim::cta()) != 0) shim::yield();
    ++shim::progress;
}
template <unsigned kCluster, class P>
void store_peer(SharedAddress to, SharedAddress landed, unsigned cta, const P& value) {
    *of_peer<kCluster, P>(to, cta) = value;
    if (kCluster == 1) return;
    size_t& missing = *of_peer<kCluster, size_t>(landed, cta);
    if (missing < sizeof(P)) {
        std::fprintf(stderr, "more bytes are stored than their receiver expects\n");
        std::exit(3);
    }
    missing -= sizeof(P), ++shim::progress;
}
