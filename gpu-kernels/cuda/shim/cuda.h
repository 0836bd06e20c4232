// Lets g++ compile kv.cu, unchanged, for the CPU: defines what kv.cu uses of CUDA. launch.cpp runs it.
//
// A CUDA block's threads are fibers of one thread of the host. A fiber runs until it comes to a barrier or a shuffle, which
// holds it until all threads that take part have come; if one never comes, the launch fails. An access that is not aligned, or
// outside of what the test has allowed, fails too. Shared memory keeps its content from launch to launch, as a GPU's does.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
// One block runs on a thread of the host at a time.
#define __shared__ static thread_local

struct uint3 {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

extern thread_local uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace kv_shim {
// Checks that the launch may make this access; does not return if it may not.
void access(const void *at, std::size_t bytes);
// Waits for every thread of the block.
void barrier();
// Gives `value` to the lanes of `mask`, and returns what the lane `from` gave.
std::uint64_t exchange(unsigned mask, std::uint64_t value, unsigned from);

template <typename T> T load(const T *from) {
    access(from, sizeof(T));
    T value;
    // Not through an lvalue of T: the memory is bytes to the rest of the program.
    std::memcpy(&value, from, sizeof(T));
    return value;
}

template <typename T> void store(T *to, T value) {
    access(to, sizeof(T));
    std::memcpy(to, &value, sizeof(T));
}

template <typename T> T shuffle(unsigned mask, T value, unsigned from) {
    static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes at most");
    std::uint64_t wide = 0;
    std::memcpy(&wide, &value, sizeof(T));
    wide = exchange(mask, wide, from);
    std::memcpy(&value, &wide, sizeof(T));
    return value;
}
} // namespace kv_shim

template <typename T> T __ldcs(const T *from) { return kv_shim::load(from); }
template <typename T> T __ldcg(const T *from) { return kv_shim::load(from); }
template <typename T> void __stcs(T *to, T value) { kv_shim::store(to, value); }
template <typename T> void __stcg(T *to, T value) { kv_shim::store(to, value); }

inline void __syncthreads() { kv_shim::barrier(); }

// Where the other lane would be beyond the warp's end, a lane gets its own value, as in CUDA.
template <typename T> T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
    const unsigned lane = threadIdx.x % 32;
    return kv_shim::shuffle(mask, value, lane + distance < 32 ? lane + distance : lane);
}
template <typename T> T __shfl_xor_sync(unsigned mask, T value, unsigned bits) {
    return kv_shim::shuffle(mask, value, (threadIdx.x % 32) ^ (bits & 31));
}
template <typename T> T __shfl_sync(unsigned mask, T value, unsigned from) {
    return kv_shim::shuffle(mask, value, from & 31);
}
