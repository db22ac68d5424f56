// Reads a launch (grid, block, parameter struct, buffers, which struct fields point where), runs it, writes the buffers back.
#include "host_shim.h"
#include "host_tma.h"
#include KERNEL_FILE

#include <type_traits>

template <class P>
struct Call {
    static inline void (*kernel)(P);
    static inline std::remove_const_t<P> params;
    static void run() { kernel(params); }
};

template <class P>
static void launch(void (*kernel)(P), const std::vector<char>& bytes) {
    if (sizeof(P) != bytes.size()) {
        std::fprintf(stderr, "parameter struct: %zu bytes here, %zu there\n", sizeof(P), bytes.size());
        std::exit(2);
    }
    Call<P>::kernel = kernel;
    std::memcpy(&Call<P>::params, bytes.data(), sizeof(P));
    shim::body = Call<P>::run;
    for (unsigned z = 0; z < shim::grid_size.z; ++z)
        for (unsigned y = 0; y < shim::grid_size.y; ++y)
            for (unsigned x = 0; x < shim::grid_size.x; x += shim::kCluster) {
                shim::block_index = {x, y, z};
                shim::run_block();
            }
}

struct Buffer {
    char* data;
    long long size;
};

static void read(FILE* file, void* to, size_t size) {
    if (std::fread(to, 1, size, file) != size) std::exit(5);
}
static long long number(FILE* file) {
    long long n;
    read(file, &n, 8);
    return n;
}

int main(int, char** argv) {
    FILE* in = std::fopen(argv[1], "rb");
    shim::grid_size.x = number(in), shim::grid_size.y = number(in), shim::grid_size.z = number(in);
    shim::block_size = number(in);
    std::vector<char> params(number(in));
    read(in, params.data(), params.size());
    std::vector<Buffer> buffers(number(in));
    for (Buffer& buffer : buffers) {
        buffer.size = number(in);
        buffer.data = static_cast<char*>(std::malloc(buffer.size));  // the exact size, so that overruns are seen
        if (reinterpret_cast<size_t>(buffer.data) % 16) std::exit(4);
        read(in, buffer.data, buffer.size);
    }
    for (long long i = number(in); i > 0; --i) {
        const long long at = number(in), buffer = number(in), offset = number(in);
        char* address = buffers[buffer].data + offset;
        std::memcpy(params.data() + at, &address, 8);
    }
    std::fclose(in);
    launch(KERNEL_NAME, params);
    FILE* out = std::fopen(argv[2], "wb");
    for (Buffer& buffer : buffers) {
        if (std::fwrite(buffer.data, 1, buffer.size, out) != static_cast<size_t>(buffer.size)) std::exit(6);
        std::free(buffer.data);
    }
    std::fclose(out);
}
