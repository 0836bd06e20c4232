// Kernels for the fake's own tests, in place of kvring's: defines the same functions as cuda/shim/launch.cpp.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {
const size_t SIZES[] = {sizeof(char *), sizeof(char *), sizeof(size_t)};
const int FAILED = 3, OUTSIDE = 5;
thread_local std::vector<size_t> allowed;

bool may(const char *address, size_t bytes) {
    size_t at = reinterpret_cast<size_t>(address);
    for (size_t k = 0; k < allowed.size(); k += 2) {
        if (at >= allowed[k] && at + bytes <= allowed[k] + allowed[k + 1]) return true;
    }
    return false;
}
}  // namespace

// `standin_copy(to, from, bytes)`, and `standin_fail` with the same parameters.
extern "C" int kv_shim_params(const char *kernel, const size_t **sizes, int *count) {
    if (std::strcmp(kernel, "standin_copy") && std::strcmp(kernel, "standin_fail")) return 1;
    *sizes = SIZES;
    *count = 3;
    return 0;
}

extern "C" void kv_shim_allow(const size_t *ranges, size_t count) { allowed.assign(ranges, ranges + 2 * count); }

extern "C" int kv_shim_launch(const char *kernel, unsigned, unsigned, unsigned, void **params) {
    if (!std::strcmp(kernel, "standin_fail")) return FAILED;
    char *to = *static_cast<char **>(params[0]);
    const char *from = *static_cast<char **>(params[1]);
    size_t bytes = *static_cast<size_t *>(params[2]);
    if (!may(to, bytes) || !may(from, bytes)) return OUTSIDE;
    std::memcpy(to, from, bytes);
    return 0;
}
