// Initialisation, devices, contexts, entry points, names of errors.
#include "fake.h"

#include <cstdio>
#include <cstring>
#include <dlfcn.h>

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

struct Attribute {
    int number;
    int value;
};
// The attributes of an H100, as far as kvring or cudarc ask for them.
const Attribute ATTRIBUTES[] = {
    {1, 1024},     // threads per block
    {2, 1024},     // block x
    {5, 2147483647},  // grid x
    {8, 48 * 1024},   // shared memory per block
    {10, 32},      // warp
    {14, 512},     // texture alignment
    {16, 132},     // multiprocessors
    {18, 0},       // integrated
    {19, 1},       // can map host memory
    {20, 0},       // compute mode
    {31, 1},       // concurrent kernels
    {33, 1},       // PCI bus
    {34, 0},       // PCI device
    {39, 2048},    // threads per multiprocessor
    {40, 3},       // copy engines
    {41, 1},       // unified addressing
    {50, 0},       // PCI domain
    {75, 9},       // compute capability
    {76, 0},
    {78, 1},       // stream priorities
    {81, 228 * 1024},  // shared memory per multiprocessor
    {88, 0},       // pageable memory access
    {92, 0},       // stream memory operations
    {97, 227 * 1024},  // shared memory per block, opted in
    {99, 1},       // host registration
    {113, 1},      // read-only host registration
    {115, 0},      // memory pools: there are none here
};

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

EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    ENTER(cuDeviceGetAttribute, INIT);
    if (!has(fake, device)) return CUDA_ERROR_INVALID_DEVICE;
    *value = 0;
    if (attribute == 91) *value = fake.config.host_pointers;
    if (attribute == 33) {
        *value = device + 1;
        return CUDA_SUCCESS;
    }
    for (auto &known : ATTRIBUTES) {
        if (known.number == attribute) *value = known.value;
    }
    return CUDA_SUCCESS;
}

static CUresult uuid_of(State &fake, unsigned char *uuid, CUdevice device) {
    if (!has(fake, device)) return CUDA_ERROR_INVALID_DEVICE;
    std::memset(uuid, 0xfa, 16);
    uuid[15] = static_cast<unsigned char>(device);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetUuid(unsigned char *uuid, CUdevice device) {
    ENTER(cuDeviceGetUuid, INIT);
    return uuid_of(fake, uuid, device);
}

EXPORT CUresult cuDeviceGetUuid_v2(unsigned char *uuid, CUdevice device) {
    ENTER(cuDeviceGetUuid_v2, INIT);
    return uuid_of(fake, uuid, device);
}

EXPORT CUresult cuDeviceGetPCIBusId(char *text, int bytes, CUdevice device) {
    ENTER(cuDeviceGetPCIBusId, INIT);
    if (!has(fake, device)) return CUDA_ERROR_INVALID_DEVICE;
    std::snprintf(text, size_t(bytes), "0000:%02X:00.0", device + 1);
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

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    ENTER(cuDevicePrimaryCtxGetState, INIT);
    if (!has(fake, device)) return CUDA_ERROR_INVALID_DEVICE;
    *flags = 0;
    *active = fake.contexts[size_t(device)].refs > 0;
    return CUDA_SUCCESS;
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

EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    ENTER(cuCtxGetDevice, CONTEXT);
    *device = call.context->device;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetFlags(unsigned *flags) {
    ENTER(cuCtxGetFlags, CONTEXT);
    *flags = 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetFlags(unsigned) {
    ENTER(cuCtxSetFlags, CONTEXT);
    return CUDA_SUCCESS;
}

namespace fake {
CUresult batch_copy(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count, void *attributes,
                    size_t *attribute_indices, size_t attribute_count, size_t *failed, CUstream stream);
}

enum Found { FOUND = 0, NO_SYMBOL = 1, TOO_OLD = 2 };

static Found entry_point(State &fake, const std::string &symbol, void **pointer, int version) {
    *pointer = nullptr;
    // It is not exported, so a caller gets it only by asking for its version.
    if (symbol == "cuMemcpyBatchAsync") {
        if (fake.config.version < 12080) return NO_SYMBOL;
        if (version < 12080) return TOO_OLD;
        // From 13000 on it has another signature, which is not here.
        if (version >= 13000) return NO_SYMBOL;
        *pointer = reinterpret_cast<void *>(&batch_copy);
        return FOUND;
    }
    Dl_info here;
    if (symbol.rfind("cu", 0) || !dladdr(reinterpret_cast<void *>(&cuInit), &here)) return NO_SYMBOL;
    void *library = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    if (!library) return NO_SYMBOL;
    for (const char *suffix : {"_v2", ""}) {
        if ((*pointer = dlsym(library, (symbol + suffix).c_str()))) break;
    }
    dlclose(library);
    return *pointer ? FOUND : NO_SYMBOL;
}

EXPORT CUresult cuGetProcAddress_v2(const char *symbol, void **pointer, int version, uint64_t, int *status) {
    ENTER(cuGetProcAddress, NOTHING);
    if (!symbol || !pointer) return CUDA_ERROR_INVALID_VALUE;
    Found found = entry_point(fake, symbol, pointer, version);
    // If there is a place for the status, only the status says it: a caller that looks at the result alone gets a null pointer.
    if (status) *status = found;
    return status || found == FOUND ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

EXPORT CUresult cuGetProcAddress(const char *symbol, void **pointer, int version, uint64_t flags) {
    return cuGetProcAddress_v2(symbol, pointer, version, flags, nullptr);
}

namespace {
struct Name {
    CUresult error;
    const char *name;
};
#define NAME(e) {e, #e}
const Name NAMES[] = {
    NAME(CUDA_SUCCESS), NAME(CUDA_ERROR_INVALID_VALUE), NAME(CUDA_ERROR_OUT_OF_MEMORY),
    NAME(CUDA_ERROR_NOT_INITIALIZED), NAME(CUDA_ERROR_STUB_LIBRARY), NAME(CUDA_ERROR_DEVICE_UNAVAILABLE),
    NAME(CUDA_ERROR_NO_DEVICE), NAME(CUDA_ERROR_INVALID_DEVICE), NAME(CUDA_ERROR_INVALID_IMAGE),
    NAME(CUDA_ERROR_INVALID_CONTEXT), NAME(CUDA_ERROR_NO_BINARY_FOR_GPU), NAME(CUDA_ERROR_INVALID_PTX),
    NAME(CUDA_ERROR_UNSUPPORTED_PTX_VERSION), NAME(CUDA_ERROR_INVALID_HANDLE), NAME(CUDA_ERROR_ILLEGAL_STATE),
    NAME(CUDA_ERROR_NOT_FOUND), NAME(CUDA_ERROR_NOT_READY), NAME(CUDA_ERROR_ILLEGAL_ADDRESS),
    NAME(CUDA_ERROR_CONTEXT_IS_DESTROYED), NAME(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED),
    NAME(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED), NAME(CUDA_ERROR_MISALIGNED_ADDRESS), NAME(CUDA_ERROR_LAUNCH_FAILED), NAME(CUDA_ERROR_NOT_PERMITTED),
    NAME(CUDA_ERROR_NOT_SUPPORTED), NAME(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED),
    NAME(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED), NAME(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED),
    NAME(CUDA_ERROR_STREAM_CAPTURE_UNJOINED), NAME(CUDA_ERROR_STREAM_CAPTURE_ISOLATION),
    NAME(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT), NAME(CUDA_ERROR_CAPTURED_EVENT),
    NAME(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD), NAME(CUDA_ERROR_UNKNOWN),
};
}  // namespace

EXPORT CUresult cuGetErrorName(CUresult error, const char **name) {
    *name = nullptr;
    for (auto &known : NAMES) {
        if (known.error == error) *name = known.name;
    }
    return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) { return cuGetErrorName(error, text); }
