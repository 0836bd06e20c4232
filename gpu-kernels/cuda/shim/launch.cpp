// Runs the kernels of kv.cu on the CPU: see cuda.h. Build it as one file:
//
//   g++ -std=c++17 -O2 -shared -fPIC -o libkv.so launch.cpp
//
// -DKV_SOURCE='"..."' takes another source than ../kv.cu.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <ucontext.h>
#include <utility>
#include <vector>

// All but the functions at the end is hidden: two of these libraries in one process must not share kernels or shared memory.
#pragma GCC visibility push(hidden)
#include "cuda.h"

#ifndef KV_SOURCE
#define KV_SOURCE "../kv.cu"
#endif
#include KV_SOURCE

thread_local uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

// What kv_shim_launch returns.
enum Status : int {
    OK = 0,
    NO_KERNEL = 1,  // no kernel of that name
    BAD_LAUNCH = 2, // no blocks, a block that is not 1 to 32 whole warps, or dynamic shared memory
    STUCK = 3,      // a barrier or a shuffle waits for a thread that waits elsewhere or has ended
    UNALIGNED = 4,  // an access at an address that is no multiple of its size
    OUTSIDE = 5,    // an access outside of the allowed ranges
};

constexpr unsigned LANES = 32;
constexpr unsigned MAX_THREADS = 1024;
constexpr std::size_t STACK = 64 << 10;

enum class State { RUNS, AT_BARRIER, AT_EXCHANGE, ENDED };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state;
    unsigned mask;
    std::uint64_t given, taken;
    unsigned from;
};

using Range = std::pair<std::uintptr_t, std::uintptr_t>;

// Each launching thread has its own, so any number of threads may launch at once.
thread_local std::vector<Fiber> fibers;
thread_local unsigned current;
thread_local ucontext_t scheduler;
thread_local int status;
thread_local std::vector<Range> allowed;
thread_local std::size_t moved;
thread_local unsigned launches;
thread_local void (*kernel)(void **);
thread_local void **parameters;

void fail(int why) {
    if (status == OK) status = why;
}

// Goes back to the scheduler, until that lets this fiber go on.
void wait(State state) {
    fibers[current].state = state;
    swapcontext(&fibers[current].context, &scheduler);
}

void fiber_main() {
    kernel(parameters);
    // The fiber ends here: the scheduler never lets it go on.
    wait(State::ENDED);
}

// Lets those fibers of a warp go on whose exchange is complete: all lanes that a fiber names have come and name the same lanes.
bool exchange_in_warp(unsigned first) {
    bool any = false;
    for (unsigned lane = 0; lane < LANES; lane++) {
        const Fiber &leader = fibers[first + lane];
        if (leader.state != State::AT_EXCHANGE) continue;
        const unsigned mask = leader.mask;
        bool complete = (mask >> lane & 1) != 0;
        for (unsigned other = 0; other < LANES; other++) {
            if ((mask >> other & 1) == 0) continue;
            const Fiber &fiber = fibers[first + other];
            complete &= fiber.state == State::AT_EXCHANGE && fiber.mask == mask;
        }
        if (!complete) continue;
        for (unsigned other = 0; other < LANES; other++) {
            if ((mask >> other & 1) == 0) continue;
            Fiber &fiber = fibers[first + other];
            // A lane that takes no part has given nothing: its value is meaningless.
            fiber.taken = (mask >> fiber.from & 1) != 0 ? fibers[first + fiber.from].given : 0xdeadbeefdeadbeef;
        }
        for (unsigned other = 0; other < LANES; other++) {
            if ((mask >> other & 1) != 0) fibers[first + other].state = State::RUNS;
        }
        any = true;
    }
    return any;
}

// If a thread has ended and others wait at a barrier, the kernel is wrong, and nobody goes on.
bool pass_barrier(unsigned threads) {
    for (unsigned t = 0; t < threads; t++) {
        if (fibers[t].state != State::AT_BARRIER) return false;
    }
    for (unsigned t = 0; t < threads; t++) fibers[t].state = State::RUNS;
    return true;
}

void run_block(unsigned threads) {
    for (unsigned t = 0; t < threads; t++) {
        Fiber &fiber = fibers[t];
        if (!fiber.stack) fiber.stack.reset(new char[STACK]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, fiber_main, 0);
        fiber.state = State::RUNS;
    }
    for (;;) {
        bool ended = true;
        // One launch runs the fibers from the first on, the next from the last. So threads that nothing keeps in step get ahead
        // of one another in both orders.
        for (unsigned k = 0; k < threads && status == OK; k++) {
            const unsigned t = launches % 2 == 0 ? k : threads - 1 - k;
            current = t;
            threadIdx = {t, 0, 0};
            if (fibers[t].state == State::RUNS) swapcontext(&scheduler, &fibers[t].context);
            ended &= fibers[t].state == State::ENDED;
        }
        if (ended || status != OK) return;
        bool on = false;
        for (unsigned first = 0; first < threads; first += LANES) on |= exchange_in_warp(first);
        if (!on && !pass_barrier(threads)) return fail(STUCK);
    }
}

template <typename F> struct Entry;
template <typename... A> struct Entry<void (*)(A...)> {
    static constexpr std::size_t sizes[] = {sizeof(A)...};
    static constexpr int count = sizeof...(A);
    template <void (*F)(A...), std::size_t... I> static void call(void **parameters, std::index_sequence<I...>) {
        F(*static_cast<A *>(parameters[I])...);
    }
    template <void (*F)(A...)> static void run(void **parameters) {
        call<F>(parameters, std::index_sequence_for<A...>());
    }
};

struct Kernel {
    const char *name;
    void (*run)(void **);
    const std::size_t *sizes;
    int count;
};

#define KERNEL(name) {#name, Entry<decltype(&name)>::run<name>, Entry<decltype(&name)>::sizes, Entry<decltype(&name)>::count}
#define KERNELS(V) KERNEL(kv_gather_##V), KERNEL(kv_scatter_##V), KERNEL(kv_checksum_##V)
const Kernel kernels[] = {KERNELS(16), KERNELS(8), KERNELS(4)};

const Kernel *find(const char *name) {
    for (const Kernel &kernel : kernels) {
        if (std::strcmp(kernel.name, name) == 0) return &kernel;
    }
    return nullptr;
}

} // namespace

void kv_shim::access(const void *at, std::size_t bytes) {
    const auto address = reinterpret_cast<std::uintptr_t>(at);
    moved += bytes;
    if (address % bytes != 0) {
        fail(UNALIGNED);
        wait(State::ENDED);
    }
    if (allowed.empty()) return;
    const auto next = std::upper_bound(allowed.begin(), allowed.end(), Range(address, UINTPTR_MAX));
    if (next == allowed.begin() || address + bytes > (next - 1)->second) {
        fail(OUTSIDE);
        wait(State::ENDED);
    }
}

void kv_shim::barrier() { wait(State::AT_BARRIER); }

std::uint64_t kv_shim::exchange(unsigned mask, std::uint64_t value, unsigned from) {
    Fiber &fiber = fibers[current];
    fiber.mask = mask;
    fiber.given = value;
    fiber.from = from;
    wait(State::AT_EXCHANGE);
    return fiber.taken;
}

#pragma GCC visibility pop

// Takes parameters as cuLaunchKernel does, and returns a `Status`. Any number of threads may launch at once.
extern "C" int kv_shim_launch(const char *name, unsigned grid, unsigned block, unsigned shared, void **params) {
    const Kernel *found = find(name);
    if (found == nullptr) return NO_KERNEL;
    if (grid == 0 || block == 0 || block > MAX_THREADS || block % LANES != 0 || shared != 0) return BAD_LAUNCH;
    if (fibers.size() < block) fibers.resize(block);
    kernel = found->run;
    parameters = params;
    status = OK;
    moved = 0;
    launches++;
    blockDim = {block, 1, 1};
    gridDim = {grid, 1, 1};
    for (unsigned b = 0; b < grid && status == OK; b++) {
        blockIdx = {b, 0, 0};
        run_block(block);
    }
    return status;
}

// The sizes of a kernel's parameters; nonzero if there is no such kernel.
extern "C" int kv_shim_params(const char *name, const std::size_t **sizes, int *count) {
    const Kernel *found = find(name);
    if (found == nullptr) return NO_KERNEL;
    *sizes = found->sizes;
    *count = found->count;
    return OK;
}

// From now on launches of this thread may load and store only in these ranges (an address and a length in bytes for each);
// without ranges, anywhere. Ranges may overlap.
extern "C" void kv_shim_allow(const std::size_t *ranges, std::size_t count) {
    std::vector<Range> sorted;
    for (std::size_t k = 0; k < count; k++) sorted.emplace_back(ranges[2 * k], ranges[2 * k] + ranges[2 * k + 1]);
    std::sort(sorted.begin(), sorted.end());
    allowed.clear();
    for (const Range &range : sorted) {
        if (!allowed.empty() && range.first <= allowed.back().second) {
            allowed.back().second = std::max(allowed.back().second, range.second);
        } else {
            allowed.push_back(range);
        }
    }
}

// Bytes that this thread's latest launch has loaded and stored, not counting tiles and partial sums.
extern "C" std::size_t kv_shim_moved() { return moved; }
