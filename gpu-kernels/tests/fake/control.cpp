// The settings and functions by which tests control the fake, and the first steps of every call.
//
// Environment, read at the first call:
//   FAKE_CUDA_DEVICES=1        number of devices; with 0 cuInit gives NO_DEVICE
//   FAKE_CUDA_VERSION=12080    of the driver; cuMemcpyBatchAsync exists from 12080 on
//   FAKE_CUDA_STUB=1           cuInit gives STUB_LIBRARY
//   FAKE_CUDA_HOST_POINTER=0   CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM; a kernel that uses the host's address then fails
//   FAKE_CUDA_MEMORY=bytes     of each device (1 GiB)
//   FAKE_CUDA_LOCKED=bytes[:e] most pinned memory, and the error beyond it (OUT_OF_MEMORY)
//   FAKE_CUDA_DELAY_US=200     each operation starts later by a random time up to this
//   FAKE_CUDA_PTX_MAX=8.7      newest PTX that loads
//   FAKE_CUDA_IGNORE=a,b       these calls do nothing and succeed (only for calls without results)
//   FAKE_CUDA_REPORT=1         at exit the fake writes to standard error which objects were left
// Names of calls may have their suffix _v2 or not.
#include "fake.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>

namespace fake {
namespace {

const char *setting(const char *name) {
    const char *value = std::getenv(name);
    return value && *value ? value : nullptr;
}

void number(const char *name, std::function<void(unsigned long long)> use) {
    if (const char *value = setting(name)) use(std::strtoull(value, nullptr, 10));
}

std::string plain(const char *call) {
    std::string name = call ? call : "";
    size_t n = name.size();
    if (n > 3 && name[n - 3] == '_' && name[n - 2] == 'v') name.resize(n - 3);
    return name;
}

struct Counts {
    uint64_t contexts, streams, events, allocations, pinned, registrations, modules;
};

Counts count(State &fake) {
    Counts c{};
    for (auto &context : fake.contexts) c.contexts += uint64_t(context.refs);
    c.streams = fake.streams.size();
    c.events = fake.events.size();
    c.allocations = fake.allocations.size();
    for (auto &entry : fake.pinned) ++(entry.second.ours ? c.pinned : c.registrations);
    c.modules = fake.modules.size();
    return c;
}

void report() {
    State &fake = state();
    std::lock_guard<std::mutex> lock(fake.mutex);
    Counts c = count(fake);
    auto say = [](const char *what, uint64_t n) {
        if (n) std::fprintf(stderr, "fake_cuda: left %llu %s\n", static_cast<unsigned long long>(n), what);
    };
    say("contexts", c.contexts);
    say("streams", c.streams);
    say("events", c.events);
    say("allocations", c.allocations);
    say("pinned allocations", c.pinned);
    say("registrations", c.registrations);
    say("modules", c.modules);
}

}  // namespace

State::State() {
    number("FAKE_CUDA_DEVICES", [&](auto n) { config.devices = int(n); });
    number("FAKE_CUDA_VERSION", [&](auto n) { config.version = int(n); });
    number("FAKE_CUDA_STUB", [&](auto n) { config.stub = n != 0; });
    number("FAKE_CUDA_HOST_POINTER", [&](auto n) { config.host_pointers = n != 0; });
    number("FAKE_CUDA_MEMORY", [&](auto n) { config.memory = n; });
    number("FAKE_CUDA_DELAY_US", [&](auto n) { config.delay_us = unsigned(n); });
    number("FAKE_CUDA_REPORT", [&](auto n) { config.report = n != 0; });
    number("FAKE_CUDA_LOCKED", [&](auto n) { config.locked = n; });
    if (const char *value = setting("FAKE_CUDA_LOCKED")) {
        if (const char *error = std::strchr(value, ':')) config.locked_error = CUresult(std::atoi(error + 1));
    }
    if (const char *value = setting("FAKE_CUDA_PTX_MAX")) {
        std::sscanf(value, "%d.%d", &config.ptx_major, &config.ptx_minor);
    }
    if (const char *value = setting("FAKE_CUDA_IGNORE")) {
        std::string entry;
        for (std::istringstream all(value); std::getline(all, entry, ',');) ignored.insert(plain(entry.c_str()));
    }
    contexts.resize(size_t(config.devices));
    for (int device = 0; device < config.devices; ++device) contexts[size_t(device)].device = device;
    if (config.report) std::atexit(report);
}

State &state() {
    static State *only = new State;
    return *only;
}

Call::Call(const char *name, int need) : fake(state()), lock(fake.mutex) { over = begin(name, need); }

// Is the call over before it has done anything? Then it is to return `result`.
bool Call::begin(const char *name, int need) {
    auto finish = [this](CUresult with) {
        result = with;
        lock.unlock();
        return true;
    };
    std::string call = plain(name);
    uint64_t uses = ++fake.calls[call];
    if (fake.ignored.count(call)) return finish(CUDA_SUCCESS);
    auto failure = fake.failures.find(call);
    bool failing = failure != fake.failures.end() && uses >= failure->second.from && uses <= failure->second.to;
    if (failing) return finish(failure->second.error);
    if ((need & INIT) && !fake.initialised) return finish(CUDA_ERROR_NOT_INITIALIZED);
    if (need != NOTHING && fake.lost && !(need & ENDS)) return finish(fake.lost);
    if ((need & CONTEXT) == CONTEXT) {
        context = current_context();
        if (!context) return finish(CUDA_ERROR_INVALID_CONTEXT);
        if (!context->refs) return finish(CUDA_ERROR_CONTEXT_IS_DESTROYED);
        if (context->sticky && !(need & ENDS)) return finish(context->sticky);
    }
    if ((need & UNSAFE) && captures_forbid(*this)) return finish(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    return false;
}

CUresult Call::dead() const {
    if (fake.lost) return fake.lost;
    return context ? context->sticky : CUDA_SUCCESS;
}

CUresult Call::wait(const std::function<bool()> &condition) {
    fake.changed.wait(lock, [&] { return dead() || condition(); });
    return dead();
}

}  // namespace fake

using namespace fake;

// From now on the call does nothing, and succeeds.
EXPORT void fake_cuda_ignore(const char *call) {
    std::lock_guard<std::mutex> lock(state().mutex);
    state().ignored.insert(plain(call));
}

static void fail(const char *call, int error, int after, bool once) {
    State &fake = state();
    std::lock_guard<std::mutex> lock(fake.mutex);
    std::string name = plain(call);
    uint64_t from = fake.calls[name] + uint64_t(after);
    fake.failures[name] = Failure{CUresult(error), from, once ? from : UINT64_MAX};
}

// From its `after`-th use from now on (1: the next) the call gives this error.
EXPORT void fake_cuda_fail(const char *call, int error, int after) { fail(call, error, after, false); }

// The call gives this error once, at its `after`-th use from now on (1: the next).
EXPORT void fake_cuda_fail_once(const char *call, int error, int after) { fail(call, error, after, true); }

// From now on no call is ignored or made to fail.
EXPORT void fake_cuda_reset() {
    std::lock_guard<std::mutex> lock(state().mutex);
    state().ignored.clear();
    state().failures.clear();
}

// How often the call was made. Calls that were ignored or failed count as well.
EXPORT uint64_t fake_cuda_calls(const char *call) {
    std::lock_guard<std::mutex> lock(state().mutex);
    auto entry = state().calls.find(plain(call));
    return entry == state().calls.end() ? 0 : entry->second;
}

// How many objects there are.
EXPORT void fake_cuda_counts(Counts *counts) {
    std::lock_guard<std::mutex> lock(state().mutex);
    *counts = count(state());
}

// The device is gone: queued work never runs, and every call gives this error.
EXPORT void fake_cuda_lose(int error) {
    std::lock_guard<std::mutex> lock(state().mutex);
    state().lost = CUresult(error);
    state().changed.notify_all();
}
