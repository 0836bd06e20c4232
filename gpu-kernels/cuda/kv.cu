// The kernels that move KV between the pages of a paged cache and a shard, and that sum shards up.
//
// A shard is cut into tiles (src/tiles.rs). A launch takes `tiles[first .. first + count]`, a window of the shard. `shard` is
// the address at which byte 0 of the shard would be: a caller that has only the window in memory passes the window's address
// less its offset in the shard, and the additions here wrap. It may be memory of the host that another process writes
// meanwhile, so it is never read through the non-coherent path (`ld.global.nc`): a value read once is used as it was read.
//
// One warp takes a tile at a time, so any grid, and any block of 1 to 32 whole warps, gives the same result.
//
// Compiled by `cuda/compile` into kv.ptx, and by g++ through shim/ for the tests.

#define KV_BLOCKS 512
#define SKIP 0xffffffffu
#define WARP 32
#define ALL_LANES 0xffffffffu

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

// One contiguous piece of a chunk: `struct Tile` of src/tiles.rs.
struct __align__(16) Tile {
    u64 base;     // address of block 0's piece
    u64 stride;   // bytes from one block's piece to the next one's
    u32 offset;   // where it is in the shard, bytes
    u32 bytes;
    u32 position; // which of the chunk's block ids names its block
    u32 reserved; // 0
};

// The block ids of a window's positions: `struct Blocks` of src/tiles.rs. Passed by value, so that a launch needs no copy
// before it.
struct Blocks {
    u32 first; // position of id[0]
    u32 id[KV_BLOCKS];
};

static_assert(sizeof(Tile) == 32 && sizeof(Blocks) == 4 + 4 * KV_BLOCKS, "as in src/tiles.rs");

// For each width in bytes: the vector that a lane moves at once, and how many vectors it has in flight.
template <u32 V> struct Width;
template <> struct Width<16> {
    typedef uint4 Vector;
    enum : u32 { in_flight = 4 };
};
template <> struct Width<8> {
    typedef uint2 Vector;
    enum : u32 { in_flight = 8 };
};
template <> struct Width<4> {
    typedef u32 Vector;
    enum : u32 { in_flight = 8 };
};

// Evict-first: pages are read only once, and so is a shard that is scattered.
template <typename T> __device__ __forceinline__ T load(u64 from) {
    return __ldcs(reinterpret_cast<const T *>(from));
}

// Evict-first into a page. Not into a shard, because the copy engine reads staging memory next, best from the L2.
template <typename T, bool to_page> __device__ __forceinline__ void store(u64 to, T value) {
    if (to_page) {
        __stcs(reinterpret_cast<T *>(to), value);
    } else {
        __stcg(reinterpret_cast<T *>(to), value);
    }
}

__device__ __forceinline__ u32 lane() { return threadIdx.x % WARP; }
__device__ __forceinline__ u32 warp_of_grid() { return (blockIdx.x * blockDim.x + threadIdx.x) / WARP; }
__device__ __forceinline__ u32 warps_of_grid() { return gridDim.x * (blockDim.x / WARP); }

__device__ __forceinline__ u32 block_of(const Tile &tile, const Blocks &blocks) {
    return blocks.id[tile.position - blocks.first];
}

__device__ __forceinline__ u64 page_of(const Tile &tile, u32 block) {
    return tile.base + static_cast<u64>(block) * tile.stride;
}

// One warp copies `bytes`. All loads of a round come before its stores: their latencies overlap.
template <u32 V, bool to_page> __device__ __forceinline__ void copy(u64 to, u64 from, u32 bytes) {
    typedef typename Width<V>::Vector Vector;
    const u32 in_flight = Width<V>::in_flight;
    const u32 step = WARP * V;
    Vector held[in_flight];
    u32 at = lane() * V;
    for (; at + (in_flight - 1) * step < bytes; at += in_flight * step) {
#pragma unroll
        for (u32 k = 0; k < in_flight; k++) held[k] = load<Vector>(from + at + k * step);
#pragma unroll
        for (u32 k = 0; k < in_flight; k++) store<Vector, to_page>(to + at + k * step, held[k]);
    }
#pragma unroll
    for (u32 k = 0; k + 1 < in_flight; k++) {
        if (at + k * step < bytes) held[k] = load<Vector>(from + at + k * step);
    }
#pragma unroll
    for (u32 k = 0; k + 1 < in_flight; k++) {
        if (at + k * step < bytes) store<Vector, to_page>(to + at + k * step, held[k]);
    }
}

template <u32 V, bool scatter>
__device__ __forceinline__ void move(const Tile *tiles, u32 first, u32 count, u64 shard, const Blocks &blocks) {
    for (u32 at = warp_of_grid(); at < count; at += warps_of_grid()) {
        const Tile tile = tiles[first + at];
        const u32 block = block_of(tile, blocks);
        if (block == SKIP) continue;
        const u64 page = page_of(tile, block);
        const u64 here = shard + tile.offset;
        if (scatter) {
            copy<V, true>(page, here, tile.bytes);
        } else {
            copy<V, false>(here, page, tile.bytes);
        }
    }
}

// The checksum of src/checksum.rs. Names and constants are as there.
__device__ __forceinline__ u32 bend(u32 x) { return x ^ (x >> 15); }

__device__ __forceinline__ u64 word(u32 index, u32 low, u32 high) {
    const u32 a = bend(index * 0x9e3779b1u + 0x85ebca6bu);
    const u32 b = bend(index * 0xc2b2ae35u + 0x27d4eb2fu);
    const u64 swapped = static_cast<u64>(low) << 32 | high;
    return static_cast<u64>(low + a) * static_cast<u64>(high + b) + swapped;
}

__device__ __forceinline__ u64 single(u64 position, u8 value) {
    u64 odd = position * 0xff51afd7ed558ccdull;
    odd = (odd << 31 | odd >> 33) * 0xc4ceb9fe1a85ec53ull | 1;
    return (static_cast<u64>(value) + 1) * odd;
}

// What a lane reads at once for a checksum: whole words, one or two.
template <u32 V> struct Words;
template <> struct Words<16> {
    enum : u32 { bytes = 16 };
    uint4 v;
    __device__ __forceinline__ void read(u64 from) { v = load<uint4>(from); }
    __device__ __forceinline__ u64 sum(u32 index) const { return word(index, v.x, v.y) + word(index + 1, v.z, v.w); }
};
template <> struct Words<8> {
    enum : u32 { bytes = 8 };
    uint2 v;
    __device__ __forceinline__ void read(u64 from) { v = load<uint2>(from); }
    __device__ __forceinline__ u64 sum(u32 index) const { return word(index, v.x, v.y); }
};
template <> struct Words<4> {
    enum : u32 { bytes = 8 };
    u32 low, high;
    __device__ __forceinline__ void read(u64 from) {
        low = load<u32>(from);
        high = load<u32>(from + 4);
    }
    __device__ __forceinline__ u64 sum(u32 index) const { return word(index, low, high); }
};

// This lane's share of `part(bytes of the tile, offset)`, read from `from`.
template <u32 V> __device__ __forceinline__ u64 part(u64 from, u32 offset, u32 bytes) {
    const u32 in_flight = 4;
    const u32 step = WARP * Words<V>::bytes;
    u64 sum = 0;
    if (V < 8) {
        // Half words at the ends: four lanes take a byte each.
        const u32 head = offset % 8;
        if (head != 0 && lane() < 4) {
            sum += single(offset + lane(), static_cast<u8>(load<u32>(from) >> (8 * lane())));
        }
        from += head;
        offset += head;
        bytes -= head;
        const u32 tail = bytes % 8;
        bytes -= tail;
        if (tail != 0 && lane() < 4) {
            sum += single(static_cast<u64>(offset) + bytes + lane(), static_cast<u8>(load<u32>(from + bytes) >> (8 * lane())));
        }
    }
    Words<V> held[in_flight];
    const u32 index = offset / 8;
    u32 at = lane() * Words<V>::bytes;
    for (; at + (in_flight - 1) * step < bytes; at += in_flight * step) {
#pragma unroll
        for (u32 k = 0; k < in_flight; k++) held[k].read(from + at + k * step);
#pragma unroll
        for (u32 k = 0; k < in_flight; k++) sum += held[k].sum(index + (at + k * step) / 8);
    }
#pragma unroll
    for (u32 k = 0; k + 1 < in_flight; k++) {
        if (at + k * step < bytes) held[k].read(from + at + k * step);
    }
#pragma unroll
    for (u32 k = 0; k + 1 < in_flight; k++) {
        if (at + k * step < bytes) sum += held[k].sum(index + (at + k * step) / 8);
    }
    return sum;
}

// The sum over a warp's lanes, in lane 0.
__device__ __forceinline__ u64 sum_of_warp(u64 sum) {
#pragma unroll
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) sum += __shfl_down_sync(ALL_LANES, sum, distance);
    return sum;
}

template <u32 V>
__device__ __forceinline__ void checksum(const Tile *tiles, u32 first, u32 count, u64 shard, const Blocks &blocks,
                                         u32 paged, u64 *partial) {
    __shared__ u64 sums[WARP];
    u64 sum = 0;
    for (u32 at = warp_of_grid(); at < count; at += warps_of_grid()) {
        const Tile tile = tiles[first + at];
        u64 from = shard + tile.offset;
        if (paged != 0) {
            const u32 block = block_of(tile, blocks);
            if (block != SKIP) from = page_of(tile, block);
        }
        sum += part<V>(from, tile.offset, tile.bytes);
    }
    sum = sum_of_warp(sum);
    if (lane() == 0) sums[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x < WARP) {
        sum = sum_of_warp(lane() < blockDim.x / WARP ? sums[lane()] : 0);
        // No atomics: `partial` may be memory of the host, and the host adds the sums up.
        if (lane() == 0) partial[blockIdx.x] = sum;
    }
}

#define KV_KERNELS(V)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(1024)                                                                 \
        kv_gather_##V(const Tile *tiles, u32 first, u32 count, u64 shard, const __grid_constant__ Blocks blocks) {     \
        move<V, false>(tiles, first, count, shard, blocks);                                                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(1024)                                                                 \
        kv_scatter_##V(const Tile *tiles, u32 first, u32 count, u64 shard, const __grid_constant__ Blocks blocks) {    \
        move<V, true>(tiles, first, count, shard, blocks);                                                             \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(1024)                                                                 \
        kv_checksum_##V(const Tile *tiles, u32 first, u32 count, u64 shard, const __grid_constant__ Blocks blocks,     \
                        u32 paged, u64 *partial) {                                                                     \
        checksum<V>(tiles, first, count, shard, blocks, paged, partial);                                               \
    }

KV_KERNELS(16)
KV_KERNELS(8)
KV_KERNELS(4)
