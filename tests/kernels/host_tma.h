// products/tma.cuh and products/fp8_wgmma.cuh on a CPU: boxes of matrices, mbarriers of any phase, and products. A map
// is an address, rows, columns and a box's rows (host_kernels.py makes it); an mbarrier's 64 bits are those of Phase.
#pragma once
#include <functional>
#include <random>

#include "host_shim.h"

namespace shim {
// Copies are under way until a thread that awaits one finds them landed, in any order: hardware promises none.
inline std::vector<std::function<void()>> under_way;
inline std::minstd_rand landing_order;
inline void land_one() {
    if (under_way.empty()) return;
    std::swap(under_way[landing_order() % under_way.size()], under_way.back());
    const std::function<void()> landing = std::move(under_way.back());
    under_way.pop_back();
    landing();
}
struct Phase {
    int missing_bytes;
    unsigned short missing_arrivals;
    unsigned char arrivals, parity;
};
static_assert(sizeof(Phase) == 8);
inline Phase& phase_of(SharedAddress barrier) { return *reinterpret_cast<Phase*>(barrier); }
inline void turn(Phase& phase) {
    ++progress;
    if (phase.missing_arrivals == 0 && phase.missing_bytes == 0) phase.missing_arrivals = phase.arrivals, phase.parity ^= 1;
}
inline void land(SharedAddress barrier, unsigned bytes) {
    Phase& phase = phase_of(barrier);
    phase.missing_bytes -= static_cast<int>(bytes);
    turn(phase);
}
// 16-byte chunks of eight rows of 128 bytes are swizzled.
inline size_t swizzled(size_t row, size_t byte) { return row * 128 + ((byte / 16) ^ (row % 8)) * 16 + byte % 16; }
inline float e4m3(unsigned char code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    if ((code & 127) == 127) return NAN;
    const float size = exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp(static_cast<float>(mantissa), -9);
    return code & 128 ? -size : size;
}
// The number whose first byte lies at a row's byte.
inline float input(const unsigned char* rows, size_t row, size_t byte) {
    const unsigned char* at = rows + swizzled(row, byte);
#ifdef DENSE
    const unsigned bits = (at[0] | at[1] << 8) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#else
    return e4m3(*at);
#endif
}
#ifdef DENSE
constexpr unsigned input_bytes = 2;
#else
constexpr unsigned input_bytes = 1;
#endif
}  // namespace shim

inline void init_barrier(SharedAddress barrier, unsigned arrivals) {
    shim::phase_of(barrier) = {0, static_cast<unsigned short>(arrivals), static_cast<unsigned char>(arrivals), 0};
}
inline void reveal_barriers() {}
inline void arrive(SharedAddress barrier) {
    shim::Phase& phase = shim::phase_of(barrier);
    if (phase.missing_arrivals == 0) std::exit(8);  // of the phase before: too many
    --phase.missing_arrivals;
    shim::turn(phase);
}
inline void arrive_expecting(SharedAddress barrier, unsigned bytes) {
    shim::phase_of(barrier).missing_bytes += static_cast<int>(bytes);
    arrive(barrier);
}
inline void await(SharedAddress barrier, unsigned parity) {
    while (static_cast<volatile shim::Phase&>(shim::phase_of(barrier)).parity == parity) shim::land_one(), shim::yield();
    ++shim::progress;
}
inline unsigned long long read_once() { return 0; }
inline unsigned long long lasting() { return 0; }
template <class Map>
void copy_box(SharedAddress to, const Map& map, unsigned column, unsigned row, SharedAddress landed, unsigned long long) {
    const auto* matrix = reinterpret_cast<const unsigned char*>(map.words[0]);
    const size_t rows = map.words[1], columns = map.words[2], box_rows = map.words[3];
    shim::under_way.push_back([=] {
        for (size_t r = 0; r < box_rows; ++r)
            for (size_t c = 0; c < 128; ++c) {
                const bool inside = row + r < rows && column + c < columns;
                to[shim::swizzled(r, c)] = inside ? matrix[(row + r) * columns + column + c] : 0;
            }
        shim::land(landed, static_cast<unsigned>(box_rows) * 128);
    });
}
inline void copy_bytes(SharedAddress to, const void* from, unsigned bytes, SharedAddress landed) {
    if (bytes % 16 || reinterpret_cast<size_t>(from) % 16 || reinterpret_cast<size_t>(to) % 16) std::exit(7);
    shim::under_way.push_back([=] {
        std::memcpy(to, from, bytes);
        shim::land(landed, bytes);
    });
}
template <unsigned kCluster>
void cluster_release() {
    cluster_arrive<kCluster>();
}
template <unsigned kCluster>
void cluster_acquire() {
    cluster_wait<kCluster>();
}
template <unsigned kCluster>
AnyQuad load_peer(SharedAddress from, unsigned cta) {
    using Bytes = std::array<float, 4>;
    return {
        reinterpret_cast<SharedAddress>(kCluster == 1 ? reinterpret_cast<Bytes*>(from) : of_peer<kCluster, Bytes>(from, cta))};
}

inline unsigned long long descriptor(SharedAddress tile) { return reinterpret_cast<unsigned long long>(tile); }
// A lane's sums of wgmma: products/fp8_wgmma.cuh says which.
template <int kTiles>
void multiply(float (&d)[kTiles][4], unsigned long long weight, unsigned long long x) {
    const auto* w = reinterpret_cast<const unsigned char*>(weight);
    const auto* rows = reinterpret_cast<const unsigned char*>(x);
    const unsigned lane = shim::current % shim::block_size % 32, warp = shim::current % shim::block_size / 32 % 4;
    for (unsigned n = 0; n < kTiles; ++n)
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned output = warp * 16 + lane / 4 + i / 2 * 8, row = 8 * n + 2 * (lane % 4) + i % 2;
            float sum = 0.f;
            for (unsigned k = 0; k < 128; k += shim::input_bytes) sum += shim::input(w, output, k) * shim::input(rows, row, k);
            d[n][i] = sum;
        }
}
