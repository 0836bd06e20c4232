// Modules and kernels. A module is PTX text, which is checked but not run: the kernels that run are the same source,
// compiled for this machine (kv_shim_launch).
#include "fake.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

using namespace fake;

namespace {

bool has_entry(const std::string &text, const std::string &name) {
    const std::string entry = ".entry";
    for (size_t at = text.find(entry); at != std::string::npos; at = text.find(entry, at + 1)) {
        size_t begin = text.find_first_not_of(" \t\n", at + entry.size());
        size_t end = text.find_first_of(" \t\n(", begin);
        if (begin != std::string::npos && text.compare(begin, end - begin, name) == 0) return true;
    }
    return false;
}

// The name of the kernel that has this handle.
const std::string *kernel_of(Call &call, CUfunction handle) {
    for (auto &module : call.fake.modules) {
        for (auto &name : module.second.functions) {
            if (&name == handle && module.second.context == call.context) return &name;
        }
    }
    return nullptr;
}

using Parameters = std::vector<std::vector<char>>;

// The ranges that a kernel may touch: all memory that has an address on the device, and nothing else.
std::vector<size_t> ranges() {
    State &fake = state();
    std::lock_guard<std::mutex> lock(fake.mutex);
    // With no range at all the shim checks nothing.
    std::vector<size_t> all{0, 0};
    auto add = [&](const char *from, size_t bytes) {
        all.push_back(reinterpret_cast<size_t>(from));
        all.push_back(bytes);
    };
    for (auto &entry : fake.allocations) add(entry.first, entry.second.bytes);
    for (auto &entry : fake.pinned) {
        if (entry.second.flags & 2) add(entry.second.device, entry.second.bytes);
    }
    return all;
}

CUresult launch(const std::string &name, unsigned grid, unsigned block, Parameters &parameters) {
    std::vector<void *> pointers;
    for (auto &parameter : parameters) pointers.push_back(parameter.data());
    std::vector<size_t> all = ranges();
    kv_shim_allow(all.data(), all.size() / 2);
    switch (kv_shim_launch(name.c_str(), grid, block, 0, pointers.data())) {
    case 0:
        return CUDA_SUCCESS;
    case 4:
        return CUDA_ERROR_MISALIGNED_ADDRESS;
    case 5:
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    default:
        return CUDA_ERROR_LAUNCH_FAILED;
    }
}

}  // namespace

EXPORT CUresult cuModuleLoadDataEx(CUmodule *out, const void *image, unsigned, int *, void **) {
    ENTER(cuModuleLoadDataEx, CONTEXT | UNSAFE);
    if (!out || !image) return CUDA_ERROR_INVALID_VALUE;
    const char *text = static_cast<const char *>(image);
    // Only text is known here; a cubin starts with a byte that no text has.
    if (text[0] == 0x7f || !text[0]) return CUDA_ERROR_INVALID_IMAGE;
    const char *version = std::strstr(text, ".version"), *target = std::strstr(text, ".target sm_");
    int major = 0, minor = 0;
    if (!version || !target || std::sscanf(version, ".version %d.%d", &major, &minor) != 2) {
        return CUDA_ERROR_INVALID_PTX;
    }
    const Config &config = fake.config;
    if (std::make_pair(major, minor) > std::make_pair(config.ptx_major, config.ptx_minor)) {
        return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
    }
    // PTX for a newer device than this one.
    char *suffix = nullptr;
    if (std::strtol(target + std::strlen(".target sm_"), &suffix, 10) > 90) return CUDA_ERROR_NO_BINARY_FOR_GPU;
    *out = fake.handle();
    fake.modules[*out] = Module{call.context, text, {}};
    return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleUnload(CUmodule handle) {
    ENTER(cuModuleUnload, CONTEXT | UNSAFE | ENDS);
    auto entry = fake.modules.find(handle);
    if (entry == fake.modules.end()) return CUDA_ERROR_INVALID_HANDLE;
    fake.modules.erase(entry);
    return call.dead();
}

EXPORT CUresult cuModuleGetFunction(CUfunction *out, CUmodule handle, const char *name) {
    ENTER(cuModuleGetFunction, CONTEXT);
    auto entry = fake.modules.find(handle);
    if (entry == fake.modules.end()) return CUDA_ERROR_INVALID_HANDLE;
    Module &module = entry->second;
    if (!has_entry(module.text, name)) return CUDA_ERROR_NOT_FOUND;
    const size_t *sizes = nullptr;
    int count = 0;
    if (kv_shim_params(name, &sizes, &count)) {
        std::fprintf(stderr, "fake_cuda: the PTX has the kernel %s, and the shim has not\n", name);
        return CUDA_ERROR_NOT_FOUND;
    }
    *out = const_cast<std::string *>(&*module.functions.insert(name).first);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernel(CUfunction handle, unsigned grid, unsigned grid_y, unsigned grid_z, unsigned block,
                               unsigned block_y, unsigned block_z, unsigned shared, CUstream on, void **parameters,
                               void **extra) {
    ENTER(cuLaunchKernel, CONTEXT);
    const std::string *kernel = kernel_of(call, handle);
    if (!kernel) return CUDA_ERROR_INVALID_HANDLE;
    std::shared_ptr<Stream> stream;
    if (CUresult result = find_stream(call, on, stream)) return result;
    // The shim has one dimension, and no dynamic shared memory.
    if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || shared || extra) return CUDA_ERROR_NOT_SUPPORTED;
    if (!grid || grid > 2147483647u || !block || block > 1024) return CUDA_ERROR_INVALID_VALUE;
    const size_t *sizes = nullptr;
    int count = 0;
    if (kv_shim_params(kernel->c_str(), &sizes, &count)) return CUDA_ERROR_NOT_FOUND;
    if (count && !parameters) return CUDA_ERROR_INVALID_VALUE;
    // The caller may drop its parameters when the call returns, so they are copied.
    auto copies = std::make_shared<Parameters>();
    for (int i = 0; i < count; ++i) {
        const char *value = static_cast<const char *>(parameters[i]);
        copies->emplace_back(value, value + sizes[i]);
    }
    Op op;
    op.run = [=, name = *kernel] { return launch(name, grid, block, *copies); };
    return submit(call, stream, std::move(op), false);
}
