// Initialisation, devices, contexts, entry points, names of errors.
#include "fake.h"

#include <cstdio>
#include <cstring>

using namespace fake;

namespace {

// The contexts that this thread has pushed; the last is current. A null one can be current too.
thread_local std::vector<Context *> current;

bool has(const State &fake, int device) { return device >= 0 && device < fake.config.devices; }

Context *known(State &fake, CUcontext handle) {
    for (auto &context : fake.contexts) {
        if (&context == handle) return &context;
    }
    return nullptr;
}

}  // namespace

Context *fake::current_context() { return current.empty() ? nullptr : current.back(); }

EXPORT CUresult cuInit(unsigned flags) {
    ENTER(cuInit, NOTHING);
    if (fake.config.stub) return CUDA_ERROR_STUB_LIBRARY;
    if (fake.lost) return fake.lost;
    if (flags) return CUDA_ERROR_INVALID_VALUE;
    if (!fake.config.devices) return CUDA_ERROR_NO_DEVICE;
    fake.initialised = true;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDriverGetVersion(int *version) {
    ENTER(cuDriverGetVersion, NOTHING);
    if (!version) return CUDA_ERROR_INVALID_VALUE;
    *version = fake.config.version;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER(cuDeviceGet, INIT);
    if (!device) return CUDA_ERROR_INVALID_VALUE;
    if (!has(fake, ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetCount(int *count) {
    ENTER(cuDeviceGetCount, INIT);
    *count = fake.config.devices;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetName(char *name, int bytes, CUdevice device) {
    ENTER(cuDeviceGetName, INIT);
    if (!has(fake, device)) return CUDA_ERROR_INVALID_DEVICE;
    std::snprintf(name, size_t(bytes), "Fake H100 %d", device);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    ENTER(cuDeviceTotalMem, INIT);
    if (!has(fake, device)) return CUDA_ERROR_INVALID_DEVICE;
    *bytes = fake.config.memory;
    return CUDA_SUCCESS;
}

// The attributes that kvring and cudarc ask for, as an H100 has them. All others are 0: there are no memory pools (115), for instance.
EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    ENTER(cuDeviceGetAttribute, INIT);
    if (!has(fake, device)) return CUDA_ERROR_INVALID_DEVICE;
    const int multiprocessors = 16, pci_bus = 33, capability_major = 75, host_pointers = 91;
    switch (attribute) {
    case multiprocessors:
        *value = 132;
        break;
    case pci_bus:
        *value = device + 1;
        break;
    case capability_major:
        *value = 9;
        break;
    case host_pointers:
        *value = fake.config.host_pointers;
        break;
    default:
        *value = 0;
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    ENTER(cuDevicePrimaryCtxRetain, INIT);
    if (!has(fake, device)) return CUDA_ERROR_INVALID_DEVICE;
    Context &primary = fake.contexts[size_t(device)];
    ++primary.refs;
    *context = &primary;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    ENTER(cuDevicePrimaryCtxRelease, INIT | ENDS);
    if (!has(fake, device)) return CUDA_ERROR_INVALID_DEVICE;
    Context &primary = fake.contexts[size_t(device)];
    if (!primary.refs) return CUDA_ERROR_INVALID_CONTEXT;
    // The driver destroys everything in the context with the last reference. Here it stays, and counts as left behind.
    --primary.refs;
    return call.dead();
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
    ENTER(cuCtxGetCurrent, INIT);
    *context = current_context();
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
    ENTER(cuCtxSetCurrent, INIT);
    Context *found = known(fake, context);
    if (context && (!found || !found->refs)) return CUDA_ERROR_INVALID_CONTEXT;
    if (!current.empty()) current.pop_back();
    if (found) current.push_back(found);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
    ENTER(cuCtxPushCurrent, INIT);
    Context *found = known(fake, context);
    if (!found || !found->refs) return CUDA_ERROR_INVALID_CONTEXT;
    current.push_back(found);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    ENTER(cuCtxPopCurrent, INIT | ENDS);
    if (current.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    if (context) *context = current.back();
    current.pop_back();
    return call.dead();
}

namespace fake {
CUresult batch_copy(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count, void *attributes,
                    size_t *attribute_indices, size_t attribute_count, size_t *failed, CUstream stream);
}

// The driver gives the batch copy only to a caller that asks for a version that has it. From 13000 on it has another signature,
// which is not here. All other functions are exported, and nobody asks for them in this way.
EXPORT CUresult cuGetProcAddress_v2(const char *symbol, void **pointer, int version, uint64_t, int *status) {
    ENTER(cuGetProcAddress, NOTHING);
    if (!symbol || !pointer) return CUDA_ERROR_INVALID_VALUE;
    const int found = 0, no_symbol = 1, too_old = 2;
    int outcome = no_symbol;
    if (!std::strcmp(symbol, "cuMemcpyBatchAsync") && fake.config.version >= 12080 && version < 13000) {
        outcome = version < 12080 ? too_old : found;
    }
    *pointer = outcome == found ? reinterpret_cast<void *>(&batch_copy) : nullptr;
    // If there is a place for the status, only the status says it: a caller that looks at the result alone gets a null pointer.
    if (status) *status = outcome;
    return status || outcome == found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

EXPORT CUresult cuGetErrorName(CUresult error, const char **name) {
    switch (error) {
#define NAME(result, number)                                                                                           \
    case result:                                                                                                       \
        *name = #result;                                                                                               \
        return CUDA_SUCCESS;
        RESULTS(NAME)
#undef NAME
    }
    *name = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) { return cuGetErrorName(error, text); }
