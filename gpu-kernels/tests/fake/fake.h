// A stand-in for the CUDA driver: the part of its interface that kvring uses, on threads and plain memory.
//
// It proves orderings, contexts and registrations, not speed. Where the driver is lenient or its documents are unclear, the fake is
// strict. control.cpp lists the environment variables and the control functions.
#pragma once
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

using CUdeviceptr = unsigned long long;
using CUdevice = int;
using CUstream = void *;
using CUevent = void *;
using CUcontext = void *;
using CUmodule = void *;
using CUfunction = void *;

// The results that the fake gives: each is defined here, and named by cuGetErrorName.
#define RESULTS(X) \
    X(CUDA_SUCCESS, 0) X(CUDA_ERROR_INVALID_VALUE, 1) X(CUDA_ERROR_OUT_OF_MEMORY, 2) \
    X(CUDA_ERROR_NOT_INITIALIZED, 3) X(CUDA_ERROR_STUB_LIBRARY, 34) X(CUDA_ERROR_DEVICE_UNAVAILABLE, 46) \
    X(CUDA_ERROR_NO_DEVICE, 100) X(CUDA_ERROR_INVALID_DEVICE, 101) X(CUDA_ERROR_INVALID_IMAGE, 200) \
    X(CUDA_ERROR_INVALID_CONTEXT, 201) X(CUDA_ERROR_NO_BINARY_FOR_GPU, 209) X(CUDA_ERROR_INVALID_PTX, 218) \
    X(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, 222) X(CUDA_ERROR_INVALID_HANDLE, 400) X(CUDA_ERROR_ILLEGAL_STATE, 401) \
    X(CUDA_ERROR_NOT_FOUND, 500) X(CUDA_ERROR_NOT_READY, 600) X(CUDA_ERROR_ILLEGAL_ADDRESS, 700) \
    X(CUDA_ERROR_CONTEXT_IS_DESTROYED, 709) X(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, 712) \
    X(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, 713) X(CUDA_ERROR_MISALIGNED_ADDRESS, 716) \
    X(CUDA_ERROR_LAUNCH_FAILED, 719) X(CUDA_ERROR_NOT_PERMITTED, 800) X(CUDA_ERROR_NOT_SUPPORTED, 801) \
    X(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, 900) X(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, 901) \
    X(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, 905) X(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, 906) \
    X(CUDA_ERROR_CAPTURED_EVENT, 907) X(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, 908) X(CUDA_ERROR_UNKNOWN, 999)

enum CUresult : int {
#define DEFINE(name, number) name = number,
    RESULTS(DEFINE)
#undef DEFINE
};

// Kernels, compiled for this machine: see module.cpp.
extern "C" int kv_shim_launch(const char *kernel, unsigned grid, unsigned block, unsigned shared, void **params);
extern "C" int kv_shim_params(const char *kernel, const size_t **sizes, int *count);
extern "C" void kv_shim_allow(const size_t *ranges, size_t count);

namespace fake {

struct Stream;

struct Context {
    int device = 0;
    int refs = 0;
    // The error of the first operation that failed: every later call gives it.
    CUresult sticky = CUDA_SUCCESS;
    std::shared_ptr<Stream> legacy;
};

// One piece of work on a stream. The delay is drawn by the stream when the work's turn comes.
struct Op {
    // May it start? Called under the lock. For work that waits for an event.
    std::function<bool()> ready;
    // Are its addresses still of the same kind as at the call? Called under the lock, right before it runs.
    std::function<bool()> valid;
    // Does the work. Called without the lock.
    std::function<CUresult()> run;
    // Called under the lock at the end, even when the device is lost.
    std::function<void()> done;
    // Other streams, and how many operations each of them must have completed before this one starts.
    std::vector<std::pair<std::shared_ptr<Stream>, uint64_t>> after;
    // A delay on top of the random one.
    unsigned delay_us = 0;
};

// A capture of a stream into a graph. The fake keeps no graphs: captured work is dropped.
struct Capture {
    uint64_t id = 0;
    int mode = 0;
    std::thread::id thread;
    bool invalid = false;
};

struct Stream {
    Context *context = nullptr;
    unsigned flags = 0;
    bool legacy = false;
    bool stop = false;
    std::deque<Op> queue;
    uint64_t submitted = 0;
    uint64_t completed = 0;
    std::mt19937 random;
    std::unique_ptr<Capture> capture;
};

// One `cuEventRecord`. Streams and threads wait for this and not for the event, which may be recorded again.
struct Record {
    bool done = false;
    // The number of the capture in which it was recorded (0: none).
    uint64_t capture = 0;
};

struct Event {
    Context *context = nullptr;
    std::shared_ptr<Record> latest;
};

struct Allocation {
    size_t bytes = 0;
    Context *context = nullptr;
    // The mapping, with its guard pages.
    char *mapping = nullptr;
    size_t mapped = 0;
};

struct Pinned {
    size_t bytes = 0;
    unsigned flags = 0;
    Context *context = nullptr;
    // Made by cuMemHostAlloc, not registered.
    bool ours = false;
    // Its address on the device: the same one, or that of another mapping of the same pages.
    char *device = nullptr;
    // The other mapping has these whole pages.
    char *first_page = nullptr;
    size_t page_bytes = 0;
};

struct Module {
    Context *context = nullptr;
    std::string text;
    // The names of the kernels that were asked for. The address of a name is the kernel's handle.
    std::set<std::string> functions;
};

struct Config {
    int devices = 1;
    int version = 12080;
    bool stub = false;
    bool host_pointers = true;
    size_t memory = size_t(1) << 30;
    size_t locked = SIZE_MAX;
    CUresult locked_error = CUDA_ERROR_OUT_OF_MEMORY;
    unsigned delay_us = 200;
    int ptx_major = 8;
    int ptx_minor = 7;
    bool report = false;
};

// A call gives this error from one use to another, both included.
struct Failure {
    CUresult error;
    uint64_t from;
    uint64_t to;
};

// The whole state of the fake, behind one lock. It is never destroyed, because the threads of streams outlive main.
struct State {
    std::mutex mutex;
    std::condition_variable changed;
    Config config;
    bool initialised = false;
    CUresult lost = CUDA_SUCCESS;
    std::vector<Context> contexts;
    std::map<CUstream, std::shared_ptr<Stream>> streams;
    std::map<CUevent, std::shared_ptr<Event>> events;
    std::map<CUmodule, Module> modules;
    std::map<char *, Allocation> allocations;
    std::map<char *, Pinned> pinned;
    std::map<std::string, uint64_t> calls;
    std::set<std::string> ignored;
    std::map<std::string, Failure> failures;
    uint64_t next = 0;
    size_t locked = 0;

    State();
    // A new handle. No handle is used twice, so the fake recognises a stale one.
    void *handle() { return reinterpret_cast<void *>(0x00fa'4e00'0000ULL + ++next * 64); }
};

State &state();

// The conditions that a call requires before it does anything.
enum Need {
    NOTHING = 0,
    INIT = 1,
    CONTEXT = 3,
    // The call is not allowed while a thread captures, unless the calling thread has changed its mode (capture.cpp).
    UNSAFE = 4,
    // The call gives something back. It does so on a lost device too, and then returns the error.
    ENDS = 8,
};

// What every call does first: it counts itself, takes the lock, and finds out whether it is over already.
struct Call {
    State &fake;
    std::unique_lock<std::mutex> lock;
    bool over = false;
    CUresult result = CUDA_SUCCESS;
    Context *context = nullptr;

    Call(const char *name, int need);
    // Waits until the condition holds or the device is lost.
    CUresult wait(const std::function<bool()> &condition);
    CUresult dead() const;

  private:
    bool begin(const char *name, int need);
};

#define ENTER(name, need)                                                                                              \
    fake::Call call(#name, need);                                                                                      \
    if (call.over) return call.result;                                                                                 \
    fake::State &fake = call.fake;                                                                                     \
    (void)fake

// Streams.
Context *current_context();
CUresult find_stream(Call &call, CUstream handle, std::shared_ptr<Stream> &out);
CUresult submit(Call &call, const std::shared_ptr<Stream> &stream, Op op, bool wait);
// Waits for all work that the context has by now.
CUresult drain(Call &call);
void sleep_us(uint64_t microseconds);

// Memory. The kind of a range of addresses; `CROSSING` is a range that is not of one kind as a whole.
enum class Kind { PAGEABLE, DEVICE, PINNED, ALIAS, CROSSING };
Kind classify(CUdeviceptr address, size_t bytes);

// Capture.
bool captures_forbid(Call &call);
CUresult on_capturing(const std::shared_ptr<Stream> &stream, bool &captured);
CUresult wait_captured(const std::shared_ptr<Stream> &stream, const std::shared_ptr<Record> &record, bool &captured);

}  // namespace fake
