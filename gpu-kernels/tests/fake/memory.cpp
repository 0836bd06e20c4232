// Device memory, which is memory of this process, and pinned host memory.
#include "fake.h"

#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <sys/mman.h>

namespace fake {
namespace {

const size_t PAGE = 4096;
// Flags of a registration.
const unsigned PORTABLE = 1, DEVICE_MAP = 2;

char *host(CUdeviceptr address) { return reinterpret_cast<char *>(address); }

size_t whole(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

// How `[address, address + bytes)` lies in a map of ranges: 0 outside, 1 inside one of them, 2 partly inside, or across two.
template <class T> int lies(const std::map<char *, T> &ranges, char *address, size_t bytes, const T **in) {
    auto next = ranges.upper_bound(address);
    if (next != ranges.begin()) {
        auto before = std::prev(next);
        if (address < before->first + before->second.bytes) {
            if (in) *in = &before->second;
            return bytes <= size_t(before->first + before->second.bytes - address) ? 1 : 2;
        }
    }
    return next != ranges.end() && next->first < address + bytes ? 2 : 0;
}

// The pinned memory whose other mapping has this address, if there are other mappings.
const Pinned *alias_of(char *address) {
    if (state().config.host_pointers) return nullptr;
    for (auto &entry : state().pinned) {
        const Pinned &pinned = entry.second;
        if (address >= pinned.device && address < pinned.device + pinned.bytes) return &pinned;
    }
    return nullptr;
}

struct Mapping {
    char *from;
    char *to;
    bool writable, shared;
};

// The mappings of this process that touch the range.
std::vector<Mapping> mappings(char *from, char *to) {
    std::vector<Mapping> all;
    FILE *maps = std::fopen("/proc/self/maps", "r");
    if (!maps) return all;
    char line[4096];
    while (std::fgets(line, sizeof line, maps)) {
        uintptr_t begin, end;
        char mode[8];
        if (std::sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %7s", &begin, &end, mode) != 3) continue;
        char *first = reinterpret_cast<char *>(begin), *last = reinterpret_cast<char *>(end);
        if (last <= from || first >= to) continue;
        all.push_back({std::max(first, from), std::min(last, to), mode[0] == 'r' && mode[1] == 'w', mode[3] == 's'});
    }
    std::fclose(maps);
    return all;
}

// Maps the same pages again. Private pages cannot be mapped again, but kvring registers none.
char *map_again(const std::vector<Mapping> &from, char *first_page, size_t bytes) {
    void *place = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == MAP_FAILED) return nullptr;
    for (auto &mapping : from) {
        char *to = static_cast<char *>(place) + (mapping.from - first_page);
        size_t length = size_t(mapping.to - mapping.from);
        if (!mapping.shared || mremap(mapping.from, 0, length, MREMAP_MAYMOVE | MREMAP_FIXED, to) == MAP_FAILED) {
            std::fprintf(stderr, "fake_cuda: without FAKE_CUDA_HOST_POINTER only shared mappings can be registered\n");
            munmap(place, bytes);
            return nullptr;
        }
    }
    return static_cast<char *>(place);
}

}  // namespace

Kind classify(CUdeviceptr address, size_t bytes) {
    State &fake = state();
    char *at = host(address);
    if (int how = lies<Allocation>(fake.allocations, at, bytes, nullptr)) {
        return how == 1 ? Kind::DEVICE : Kind::CROSSING;
    }
    if (int how = lies<Pinned>(fake.pinned, at, bytes, nullptr)) return how == 1 ? Kind::PINNED : Kind::CROSSING;
    if (const Pinned *pinned = alias_of(at)) {
        return at + bytes <= pinned->device + pinned->bytes ? Kind::ALIAS : Kind::CROSSING;
    }
    return Kind::PAGEABLE;
}

}  // namespace fake

using namespace fake;

static size_t used(State &fake, int device) {
    size_t bytes = 0;
    for (auto &entry : fake.allocations) {
        if (entry.second.context->device == device) bytes += entry.second.bytes;
    }
    return bytes;
}

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    ENTER(cuMemAlloc, CONTEXT | UNSAFE);
    if (!address || !bytes) return CUDA_ERROR_INVALID_VALUE;
    size_t taken = used(fake, call.context->device);
    if (bytes > fake.config.memory - taken) return CUDA_ERROR_OUT_OF_MEMORY;
    Allocation allocation;
    allocation.bytes = bytes;
    allocation.context = call.context;
    // There is a page on either side that nobody may touch.
    allocation.mapped = whole(bytes) + 2 * PAGE;
    void *place = mmap(nullptr, allocation.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    allocation.mapping = static_cast<char *>(place);
    char *first = allocation.mapping + PAGE;
    mprotect(first, whole(bytes), PROT_READ | PROT_WRITE);
    *address = reinterpret_cast<CUdeviceptr>(first);
    fake.allocations[first] = allocation;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemFree_v2(CUdeviceptr address) {
    ENTER(cuMemFree, CONTEXT | UNSAFE | ENDS);
    if (!address) return CUDA_SUCCESS;
    if (!fake.allocations.count(host(address))) return CUDA_ERROR_INVALID_VALUE;
    // As in the driver, the call waits until all work is done.
    drain(call);
    auto entry = fake.allocations.find(host(address));
    if (entry == fake.allocations.end()) return CUDA_ERROR_INVALID_VALUE;
    Allocation allocation = entry->second;
    fake.allocations.erase(entry);
    // On a device in error something may still be running.
    if (!call.dead()) munmap(allocation.mapping, allocation.mapped);
    return call.dead();
}

EXPORT CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
    ENTER(cuMemGetInfo, CONTEXT);
    *total = fake.config.memory;
    *available = *total - used(fake, call.context->device);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *bytes, CUdeviceptr address) {
    ENTER(cuMemGetAddressRange, CONTEXT);
    const Allocation *in = nullptr;
    if (lies(fake.allocations, host(address), 1, &in) != 1) return CUDA_ERROR_NOT_FOUND;
    if (base) *base = reinterpret_cast<CUdeviceptr>(in->mapping + PAGE);
    if (bytes) *bytes = in->bytes;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemHostAlloc(void **out, size_t bytes, unsigned flags) {
    ENTER(cuMemHostAlloc, CONTEXT | UNSAFE);
    if (!out || !bytes || flags & ~7u) return CUDA_ERROR_INVALID_VALUE;
    if (bytes > fake.config.locked - fake.locked) return fake.config.locked_error;
    Pinned pinned;
    pinned.bytes = bytes;
    pinned.flags = DEVICE_MAP;
    pinned.context = call.context;
    pinned.ours = true;
    pinned.page_bytes = whole(bytes);
    void *place = mmap(nullptr, pinned.page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (place == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    pinned.first_page = pinned.device = static_cast<char *>(place);
    if (!fake.config.host_pointers) {
        void *again = mremap(place, 0, pinned.page_bytes, MREMAP_MAYMOVE);
        if (again == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
        pinned.device = static_cast<char *>(again);
    }
    fake.pinned[pinned.first_page] = pinned;
    fake.locked += bytes;
    *out = place;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemFreeHost(void *address) {
    ENTER(cuMemFreeHost, CONTEXT | UNSAFE | ENDS);
    if (!fake.pinned.count(static_cast<char *>(address))) return CUDA_ERROR_INVALID_VALUE;
    drain(call);
    auto entry = fake.pinned.find(static_cast<char *>(address));
    if (entry == fake.pinned.end() || !entry->second.ours) return CUDA_ERROR_INVALID_VALUE;
    Pinned pinned = entry->second;
    fake.pinned.erase(entry);
    fake.locked -= pinned.bytes;
    if (!call.dead()) {
        if (pinned.device != pinned.first_page) munmap(pinned.device, pinned.page_bytes);
        munmap(pinned.first_page, pinned.page_bytes);
    }
    return call.dead();
}

EXPORT CUresult cuMemHostRegister_v2(void *address, size_t bytes, unsigned flags) {
    ENTER(cuMemHostRegister, CONTEXT | UNSAFE);
    if (!address || !bytes || flags & ~(PORTABLE | DEVICE_MAP)) return CUDA_ERROR_INVALID_VALUE;
    char *start = static_cast<char *>(address);
    Pinned pinned;
    pinned.bytes = bytes;
    pinned.flags = flags;
    pinned.context = call.context;
    pinned.first_page = start - reinterpret_cast<uintptr_t>(start) % PAGE;
    pinned.page_bytes = whole(size_t(start - pinned.first_page) + bytes);
    char *end = pinned.first_page + pinned.page_bytes;
    for (auto &entry : fake.pinned) {
        const Pinned &other = entry.second;
        if (pinned.first_page < other.first_page + other.page_bytes && other.first_page < end) {
            return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
        }
    }
    if (lies<Allocation>(fake.allocations, start, bytes, nullptr)) return CUDA_ERROR_INVALID_VALUE;
    std::vector<Mapping> all = mappings(pinned.first_page, end);
    char *so_far = pinned.first_page;
    for (auto &mapping : all) {
        if (mapping.from != so_far || !mapping.writable) return CUDA_ERROR_INVALID_VALUE;
        so_far = mapping.to;
    }
    if (so_far != end) return CUDA_ERROR_INVALID_VALUE;
    if (bytes > fake.config.locked - fake.locked) return fake.config.locked_error;
    pinned.device = start;
    if (!fake.config.host_pointers) {
        char *again = map_again(all, pinned.first_page, pinned.page_bytes);
        if (!again) return CUDA_ERROR_NOT_SUPPORTED;
        pinned.device = again + (start - pinned.first_page);
    }
    fake.pinned[start] = pinned;
    fake.locked += bytes;
    return CUDA_SUCCESS;
}

// The call does not wait for copies that use the memory: a copy that runs later fails (ILLEGAL_ADDRESS).
EXPORT CUresult cuMemHostUnregister(void *address) {
    ENTER(cuMemHostUnregister, CONTEXT | UNSAFE | ENDS);
    auto entry = fake.pinned.find(static_cast<char *>(address));
    if (entry == fake.pinned.end() || entry->second.ours) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    const Pinned &pinned = entry->second;
    // The other mapping is removed, so a kernel that still uses it fails.
    if (pinned.device != entry->first) munmap(pinned.device - (entry->first - pinned.first_page), pinned.page_bytes);
    fake.locked -= pinned.bytes;
    fake.pinned.erase(entry);
    return call.dead();
}

EXPORT CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *out, void *address, unsigned flags) {
    ENTER(cuMemHostGetDevicePointer, CONTEXT);
    if (!out || flags) return CUDA_ERROR_INVALID_VALUE;
    auto next = fake.pinned.upper_bound(static_cast<char *>(address));
    if (next == fake.pinned.begin()) return CUDA_ERROR_INVALID_VALUE;
    auto entry = std::prev(next);
    ptrdiff_t offset = static_cast<char *>(address) - entry->first;
    if (size_t(offset) >= entry->second.bytes || !(entry->second.flags & DEVICE_MAP)) return CUDA_ERROR_INVALID_VALUE;
    *out = reinterpret_cast<CUdeviceptr>(entry->second.device + offset);
    return CUDA_SUCCESS;
}

// The two attributes that kvring asks for: the type of the memory (host 1, device 2), and the number of the device.
EXPORT CUresult cuPointerGetAttribute(void *data, int attribute, CUdeviceptr address) {
    ENTER(cuPointerGetAttribute, INIT);
    if (!data) return CUDA_ERROR_INVALID_VALUE;
    const Allocation *allocation = nullptr;
    const Pinned *pinned = nullptr;
    if (!lies(fake.allocations, host(address), 1, &allocation) && !lies(fake.pinned, host(address), 1, &pinned)) {
        pinned = alias_of(host(address));
        if (!pinned) return CUDA_ERROR_INVALID_VALUE;
    }
    const int memory_type = 2, device_ordinal = 9;
    switch (attribute) {
    case memory_type:
        *static_cast<unsigned *>(data) = allocation ? 2 : 1;
        return CUDA_SUCCESS;
    case device_ordinal:
        *static_cast<int *>(data) = (allocation ? allocation->context : pinned->context)->device;
        return CUDA_SUCCESS;
    default:
        return CUDA_ERROR_NOT_SUPPORTED;
    }
}
