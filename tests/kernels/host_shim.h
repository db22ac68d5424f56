// Runs a CUDA kernel on a CPU: one fiber per thread of a block, blocks one after another. Enough of CUDA for the kernels
// that use no tensor cores; built with address and undefined-behaviour sanitizers, so that an index that strays is found.
#pragma once
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

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
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

namespace shim {
struct Index {
    unsigned x = 0, y = 0, z = 0;
};
constexpr size_t kStackBytes = 256 * 1024;
struct Barrier {
    unsigned arrived = 0, generation = 0;
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    unsigned thread = 0;
    bool done = false;
    void* fake_stack = nullptr;
};
inline Index block_index, grid_size;
inline unsigned block_size, live;
inline std::vector<Fiber> fibers;
inline unsigned current;
inline ucontext_t scheduler;
inline void* scheduler_fake;
inline const void* scheduler_bottom;
inline size_t scheduler_size;
inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline std::vector<unsigned> warp_live;
inline std::vector<unsigned long long> slots;
inline void (*body)();
inline unsigned long progress;

inline void yield() {
    Fiber& self = fibers[current];
    __sanitizer_start_switch_fiber(&self.fake_stack, scheduler_bottom, scheduler_size);
    swapcontext(&self.context, &scheduler);
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
        yield();
    }
}
inline void enter() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
    body();
    Fiber& self = fibers[current];
    self.done = true;
    --live, --warp_live[current / 32], ++progress;
    __sanitizer_start_switch_fiber(nullptr, scheduler_bottom, scheduler_size);
    swapcontext(&self.context, &scheduler);
}
inline void run_block() {
    live = block_size;
    block_barrier = {};
    warp_barriers.assign((block_size + 31) / 32, {});
    warp_live.assign((block_size + 31) / 32, 0);
    slots.assign(block_size, 0);
    fibers.resize(block_size);
    for (unsigned t = 0; t < block_size; ++t) {
        Fiber& f = fibers[t];
        f.stack.resize(kStackBytes);
        f.thread = t, f.done = false, f.fake_stack = nullptr;
        ++warp_live[t / 32];
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = &scheduler;
        makecontext(&f.context, enter, 0);
    }
    while (live) {
        const unsigned long before = progress;
        for (current = 0; current < block_size; ++current) {
            Fiber& f = fibers[current];
            if (f.done) continue;
            __sanitizer_start_switch_fiber(&scheduler_fake, f.stack.data(), f.stack.size());
            swapcontext(&scheduler, &f.context);
            __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
        }
        if (progress == before) {
            std::fprintf(stderr, "deadlock: %u threads wait at a barrier others never reach\n", live);
            std::exit(3);
        }
    }
}
struct ThreadIndex {
    operator Index() const { return {current, 0, 0}; }
};
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
}  // namespace shim

#define threadIdx (shim::Index{shim::current, 0, 0})
#define blockIdx shim::block_index
#define gridDim shim::grid_size
inline void __syncthreads() { shim::wait(shim::block_barrier, shim::live); }
inline void __syncwarp() { shim::wait(shim::warp_barriers[shim::current / 32], shim::warp_live[shim::current / 32]); }
template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) { return shim::exchange(value, shim::current % 32 ^ mask); }
template <class T>
inline T __shfl_sync(unsigned, T value, int from) { return shim::exchange(value, from); }
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
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(1ull * a * b >> 32); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float_as_int(float v) { int i; std::memcpy(&i, &v, 4); return i; }
inline float __uint_as_float(unsigned v) { float f; std::memcpy(&f, &v, 4); return f; }
inline unsigned __float_as_uint(float v) { unsigned u; std::memcpy(&u, &v, 4); return u; }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
inline float __expf(float v) { return std::exp(v); }
template <class T>
inline T max(T a, T b) { return a < b ? b : a; }
template <class T>
inline T min(T a, T b) { return b < a ? b : a; }
