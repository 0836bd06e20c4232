// A stand-in for the CUDA driver: the part of its interface that kvring uses, on threads and plain memory.
//
// It proves orderings, contexts and registrations, not speed. Where the driver is lenient or its documents are
// unclear, this is strict. control.cpp lists the environment variables and the control functions.
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
using CUgraph = void *;

enum CUresult : int {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_STUB_LIBRARY = 34,
    CUDA_ERROR_DEVICE_UNAVAILABLE = 46,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_IMAGE = 200,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CUDA_ERROR_INVALID_PTX = 218,
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_ILLEGAL_STATE = 401,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_ILLEGAL_ADDRESS = 700,
    CUDA_ERROR_CONTEXT_IS_DESTROYED = 709,
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712,
    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713,
    CUDA_ERROR_MISALIGNED_ADDRESS = 716,
    CUDA_ERROR_LAUNCH_FAILED = 719,
    CUDA_ERROR_NOT_PERMITTED = 800,
    CUDA_ERROR_NOT_SUPPORTED = 801,
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901,
    CUDA_ERROR_STREAM_CAPTURE_UNMATCHED = 903,
    CUDA_ERROR_STREAM_CAPTURE_UNJOINED = 904,
    CUDA_ERROR_STREAM_CAPTURE_ISOLATION = 905,
    CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906,
    CUDA_ERROR_CAPTURED_EVENT = 907,
    CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD = 908,
    CUDA_ERROR_UNKNOWN = 999,
};

// Kernels, compiled for this machine: see module.cpp.
extern "C" int kv_shim_launch(const char *kernel, unsigned grid, unsigned block, unsigned shared, void **params);
extern "C" int kv_shim_params(const char *kernel, const size_t **sizes, int *count);
extern "C" void kv_shim_allow(const size_t *ranges, size_t count);

namespace fake {

struct Capture;
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
    // Are its addresses still what they were? Called under the lock, right before it runs.
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

struct Stream {
    CUstream handle = nullptr;
    Context *context = nullptr;
    unsigned flags = 0;
    int priority = 0;
    bool legacy = false;
    bool stop = false;
    std::deque<Op> queue;
    uint64_t submitted = 0;
    uint64_t completed = 0;
    std::mt19937 random;
    Capture *capture = nullptr;
    // In a stream that has joined a capture: has the capture waited for the stream's last work?
    bool merged = false;
};

// One `cuEventRecord`. Streams and threads wait for this and not for the event, which may be recorded again.
struct Record {
    bool done = false;
    uint64_t nanoseconds = 0;
    // The number of the capture in which it was recorded (0: none), and the stream.
    uint64_t capture = 0;
    Stream *stream = nullptr;
};

struct Event {
    Context *context = nullptr;
    unsigned flags = 0;
    std::shared_ptr<Record> latest;
};

struct Capture {
    uint64_t id = 0;
    int mode = 0;
    std::thread::id thread;
    bool invalid = false;
    std::shared_ptr<Stream> origin;
    std::vector<std::shared_ptr<Stream>> joined;
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

struct Function {
    std::string name;
    int dynamic_shared = 48 * 1024;
};

struct Module {
    Context *context = nullptr;
    std::string text;
    std::map<std::string, std::unique_ptr<Function>> functions;
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
    unsigned seed = 1;
    int ptx_major = 8;
    int ptx_minor = 7;
    bool report = false;
    bool join = false;
};

struct Failure {
    CUresult error = CUDA_SUCCESS;
    uint64_t from = 0;
    uint64_t to = UINT64_MAX;
};

// Everything, behind one lock. It is never destroyed, because streams outlive main.
struct State {
    std::mutex mutex;
    std::condition_variable changed;
    Config config;
    bool initialised = false;
    CUresult lost = CUDA_SUCCESS;
    std::vector<Context> contexts;
    std::map<CUstream, std::shared_ptr<Stream>> streams;
    std::map<CUevent, std::shared_ptr<Event>> events;
    std::map<CUmodule, std::unique_ptr<Module>> modules;
    std::set<CUgraph> graphs;
    std::map<char *, Allocation> allocations;
    std::map<char *, Pinned> pinned;
    std::map<CUstream, std::unique_ptr<Capture>> captures;
    std::map<std::string, uint64_t> calls;
    std::set<std::string> ignored;
    std::map<std::string, Failure> failures;
    uint64_t next = 0;
    size_t locked = 0;

    State();
    // A new handle. None is used twice, so a stale one is always found out.
    void *handle() { return reinterpret_cast<void *>(0x00fa'4e00'0000ULL + ++next * 64); }
};

State &state();

// What a call needs before it does anything, and what it may do.
enum Need {
    NOTHING = 0,
    INIT = 1,
    CONTEXT = 3,
    // Not allowed while somebody captures, unless the thread has changed its mode (capture.cpp).
    UNSAFE = 4,
    // Gives something back. It does so on a lost device too, and then returns the error.
    ENDS = 8,
};

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
CUresult drain(Call &call, const std::function<bool(const Stream &)> &which);
void sleep_us(uint64_t microseconds);

// Memory. The kind of a range of addresses; `CROSSING` is a range that is not of one kind as a whole.
enum class Kind { PAGEABLE, DEVICE, PINNED, ALIAS, CROSSING };
Kind classify(CUdeviceptr address, size_t bytes);

// Capture.
bool captures_forbid(Call &call);
// Called when a stream that captures is destroyed.
void end_capture_of(Stream &stream);
CUresult on_capturing(const std::shared_ptr<Stream> &stream, bool &captured);
CUresult wait_captured(const std::shared_ptr<Stream> &stream, const std::shared_ptr<Record> &record, bool &captured);

}  // namespace fake
