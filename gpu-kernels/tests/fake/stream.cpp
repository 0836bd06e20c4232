// Streams and events. Each stream is a thread with a queue.
#include "fake.h"

#include <chrono>
#include <ctime>
#include <filesystem>
#include <fstream>

namespace fake {
namespace {

const unsigned NON_BLOCKING = 1;

// Has each stream completed as many operations as it is paired with?
bool have_completed(const std::vector<std::pair<std::shared_ptr<Stream>, uint64_t>> &all) {
    for (auto &[stream, operations] : all) {
        if (stream->completed < operations) return false;
    }
    return true;
}

void serve(std::shared_ptr<Stream> stream) {
    State &fake = state();
    std::unique_lock<std::mutex> lock(fake.mutex);
    for (;;) {
        fake.changed.wait(lock, [&] { return !stream->queue.empty() || stream->stop; });
        if (stream->queue.empty()) return;
        Op op = std::move(stream->queue.front());
        stream->queue.pop_front();
        auto dead = [&] { return fake.lost || stream->context->sticky; };
        fake.changed.wait(lock, [&] { return dead() || (have_completed(op.after) && (!op.ready || op.ready())); });
        unsigned limit = fake.config.delay_us;
        uint64_t delay = op.delay_us + (limit ? stream->random() % (limit + 1) : 0);
        lock.unlock();
        sleep_us(delay);
        lock.lock();
        CUresult result = CUDA_SUCCESS;
        if (!dead() && op.valid && !op.valid()) result = CUDA_ERROR_ILLEGAL_ADDRESS;
        if (!dead() && !result && op.run) {
            lock.unlock();
            result = op.run();
            lock.lock();
        }
        if (result && !stream->context->sticky) stream->context->sticky = result;
        if (op.done) op.done();
        ++stream->completed;
        fake.changed.notify_all();
    }
}

std::shared_ptr<Stream> start(State &fake, Context *context, unsigned flags) {
    auto stream = std::make_shared<Stream>();
    stream->context = context;
    stream->flags = flags;
    stream->random.seed(unsigned(++fake.next));
    std::thread(serve, stream).detach();
    return stream;
}

CUresult create(CUstream *out, unsigned flags, Call &call) {
    if (!out || flags & ~NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
    *out = call.fake.handle();
    call.fake.streams[*out] = start(call.fake, call.context, flags);
    return CUDA_SUCCESS;
}

uint64_t now() {
    auto time = std::chrono::steady_clock::now().time_since_epoch();
    return uint64_t(std::chrono::duration_cast<std::chrono::nanoseconds>(time).count());
}

std::shared_ptr<Event> event_of(State &fake, CUevent handle) {
    auto entry = fake.events.find(handle);
    return entry == fake.events.end() ? nullptr : entry->second;
}

// For each thread of this process the time in which it was ready and had no core, in microseconds.
std::map<std::string, uint64_t> refused() {
    std::map<std::string, uint64_t> threads;
    for (auto &task : std::filesystem::directory_iterator("/proc/self/task")) {
        uint64_t ran = 0, refused = 0;
        if (std::ifstream(task.path() / "schedstat") >> ran >> refused) threads[task.path()] = refused / 1000;
    }
    return threads;
}

// The longest time for which a thread has been ready without a core since then, in microseconds.
uint64_t refused_since(const std::map<std::string, uint64_t> &then) {
    uint64_t most = 0;
    for (auto &[thread, now] : refused()) {
        auto before = then.find(thread);
        if (before != then.end()) most = std::max(most, now - before->second);
    }
    return most;
}

}  // namespace

void sleep_us(uint64_t microseconds) {
    // A long sleep lasts longer by the time for which a thread had no core. So the events that a test expects to happen during the
    // sleep do so on a busy machine, too.
    bool is_long = microseconds >= 10000;
    auto then = is_long ? refused() : std::map<std::string, uint64_t>();
    uint64_t began = now() / 1000, left = microseconds;
    while (left) {
        timespec time{time_t(left / 1000000), long(left % 1000000) * 1000};
        nanosleep(&time, nullptr);
        uint64_t longer = is_long ? std::min(refused_since(then), 10 * microseconds) : 0;
        uint64_t until = began + microseconds + longer;
        left = until - std::min(until, now() / 1000);
    }
}

CUresult find_stream(Call &call, CUstream handle, std::shared_ptr<Stream> &out) {
    // 0 and 1 are the legacy default stream; there is no per-thread one (2) here.
    if (reinterpret_cast<uintptr_t>(handle) < 2) {
        if (!call.context->legacy) {
            call.context->legacy = start(call.fake, call.context, 0);
            call.context->legacy->legacy = true;
        }
        out = call.context->legacy;
        return CUDA_SUCCESS;
    }
    auto entry = call.fake.streams.find(handle);
    if (entry == call.fake.streams.end() || entry->second->context != call.context) return CUDA_ERROR_INVALID_HANDLE;
    out = entry->second;
    return CUDA_SUCCESS;
}

CUresult submit(Call &call, const std::shared_ptr<Stream> &stream, Op op, bool wait) {
    State &fake = call.fake;
    bool captured = false;
    CUresult result = on_capturing(stream, captured);
    if (result || captured) return result;
    if (stream->legacy) {
        // The legacy stream's work runs after all work that blocking streams have now, and before all that they get later.
        for (auto &entry : fake.streams) {
            Stream &other = *entry.second;
            if (other.context != stream->context || other.flags & NON_BLOCKING) continue;
            op.after.emplace_back(entry.second, other.submitted);
        }
    } else if (!(stream->flags & NON_BLOCKING) && stream->context->legacy) {
        op.after.emplace_back(stream->context->legacy, stream->context->legacy->submitted);
    }
    stream->queue.push_back(std::move(op));
    uint64_t mine = ++stream->submitted;
    fake.changed.notify_all();
    return wait ? call.wait([&] { return stream->completed >= mine; }) : CUDA_SUCCESS;
}

CUresult drain(Call &call) {
    std::vector<std::pair<std::shared_ptr<Stream>, uint64_t>> all;
    for (auto &entry : call.fake.streams) {
        if (entry.second->context == call.context) all.emplace_back(entry.second, entry.second->submitted);
    }
    if (call.context->legacy) all.emplace_back(call.context->legacy, call.context->legacy->submitted);
    return call.wait([&] { return have_completed(all); });
}

}  // namespace fake

using namespace fake;

EXPORT CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    ENTER(cuStreamCreate, CONTEXT);
    return create(stream, flags, call);
}

EXPORT CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int) {
    ENTER(cuStreamCreateWithPriority, CONTEXT);
    return create(stream, flags, call);
}

EXPORT CUresult cuStreamDestroy_v2(CUstream handle) {
    ENTER(cuStreamDestroy, CONTEXT | ENDS);
    auto entry = fake.streams.find(handle);
    if (entry == fake.streams.end() || entry->second->context != call.context) return CUDA_ERROR_INVALID_HANDLE;
    // The work that the stream has is still done. A capture of the stream ends with it.
    entry->second->stop = true;
    fake.streams.erase(entry);
    fake.changed.notify_all();
    return call.dead();
}

EXPORT CUresult cuStreamSynchronize(CUstream handle) {
    ENTER(cuStreamSynchronize, CONTEXT | UNSAFE);
    std::shared_ptr<Stream> stream;
    if (CUresult result = find_stream(call, handle, stream)) return result;
    if (stream->capture) {
        stream->capture->invalid = true;
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    uint64_t all = stream->submitted;
    return call.wait([&] { return stream->completed >= all; });
}

EXPORT CUresult cuCtxSynchronize() {
    ENTER(cuCtxSynchronize, CONTEXT | UNSAFE);
    return drain(call);
}

EXPORT CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    ENTER(cuCtxGetStreamPriorityRange, CONTEXT);
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventCreate(CUevent *out, unsigned flags) {
    ENTER(cuEventCreate, CONTEXT);
    if (!out || flags & ~7u) return CUDA_ERROR_INVALID_VALUE;
    auto event = std::make_shared<Event>();
    event->context = call.context;
    *out = fake.handle();
    fake.events[*out] = event;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventDestroy_v2(CUevent handle) {
    ENTER(cuEventDestroy, CONTEXT | ENDS);
    if (!fake.events.erase(handle)) return CUDA_ERROR_INVALID_HANDLE;
    return call.dead();
}

EXPORT CUresult cuEventRecord(CUevent handle, CUstream on) {
    ENTER(cuEventRecord, CONTEXT);
    std::shared_ptr<Stream> stream;
    if (CUresult result = find_stream(call, on, stream)) return result;
    auto event = event_of(fake, handle);
    if (!event || event->context != stream->context) return CUDA_ERROR_INVALID_HANDLE;
    auto record = std::make_shared<Record>();
    if (stream->capture) {
        if (stream->capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        record->capture = stream->capture->id;
        event->latest = record;
        return CUDA_SUCCESS;
    }
    Op op;
    op.done = [record] { record->done = true; };
    CUresult result = submit(call, stream, std::move(op), false);
    if (!result) event->latest = record;
    return result;
}

EXPORT CUresult cuStreamWaitEvent(CUstream on, CUevent handle, unsigned flags) {
    ENTER(cuStreamWaitEvent, CONTEXT);
    if (flags & ~1u) return CUDA_ERROR_INVALID_VALUE;
    std::shared_ptr<Stream> stream;
    if (CUresult result = find_stream(call, on, stream)) return result;
    auto event = event_of(fake, handle);
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    // An event that was never recorded gives nothing to wait for.
    std::shared_ptr<Record> record = event->latest;
    if (!record) return CUDA_SUCCESS;
    bool captured = false;
    CUresult result = wait_captured(stream, record, captured);
    if (result || captured) return result;
    Op op;
    op.ready = [record] { return record->done; };
    return submit(call, stream, std::move(op), false);
}

EXPORT CUresult cuEventQuery(CUevent handle) {
    ENTER(cuEventQuery, CONTEXT | UNSAFE);
    auto event = event_of(fake, handle);
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    if (!event->latest) return CUDA_SUCCESS;
    if (event->latest->capture) return CUDA_ERROR_CAPTURED_EVENT;
    return event->latest->done ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

EXPORT CUresult cuEventSynchronize(CUevent handle) {
    ENTER(cuEventSynchronize, CONTEXT | UNSAFE);
    auto event = event_of(fake, handle);
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    std::shared_ptr<Record> record = event->latest;
    if (!record) return CUDA_SUCCESS;
    if (record->capture) return CUDA_ERROR_CAPTURED_EVENT;
    return call.wait([&] { return record->done; });
}
