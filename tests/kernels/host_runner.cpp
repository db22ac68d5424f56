// Reads a launch (grid, block, parameter struct, buffers, which struct fields point where), runs it, writes the buffers back.
#include "host_shim.h"
#include KERNEL_FILE

#include <fstream>

template <class P>
static void launch(void (*kernel)(P), const std::vector<char>& bytes) {
    if (sizeof(P) != bytes.size()) {
        std::fprintf(stderr, "parameter struct: %zu bytes here, %zu there\n", sizeof(P), bytes.size());
        std::exit(2);
    }
    std::remove_const_t<P> params;
    std::memcpy(&params, bytes.data(), sizeof(P));
    shim::body = [=] { kernel(params); };
    for (unsigned z = 0; z < shim::grid_size.z; ++z)
        for (unsigned y = 0; y < shim::grid_size.y; ++y)
            for (unsigned x = 0; x < shim::grid_size.x; ++x) {
                shim::block_index = {x, y, z};
                shim::run_block();
            }
}

int main(int, char** argv) {
    std::ifstream in(argv[1], std::ios::binary);
    const auto number = [&] {
        long long n;
        in.read(reinterpret_cast<char*>(&n), 8);
        return n;
    };
    shim::grid_size.x = number(), shim::grid_size.y = number(), shim::grid_size.z = number();
    shim::block_size = number();
    std::vector<char> params(number());
    in.read(params.data(), params.size());
    std::vector<std::pair<char*, long long>> buffers(number());
    for (auto& [data, size] : buffers) {
        size = number();
        data = static_cast<char*>(std::aligned_alloc(256, (size + 255) / 256 * 256));
        data = static_cast<char*>(std::realloc(data, size));  // the exact size, so that overruns are seen
        if (reinterpret_cast<size_t>(data) % 16) std::exit(4);
        in.read(data, size);
    }
    for (long long i = number(); i > 0; --i) {
        const long long at = number(), buffer = number(), offset = number();
        char* address = buffers[buffer].first + offset;
        std::memcpy(params.data() + at, &address, 8);
    }
    launch(KERNEL_NAME, params);
    std::ofstream out(argv[2], std::ios::binary);
    for (auto& [data, size] : buffers) {
        out.write(data, size);
        std::free(data);
    }
}
