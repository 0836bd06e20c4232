// Capture of streams into graphs. Graphs hold nothing: captured work is dropped. The fake models which calls are allowed
// during a capture, and to which threads, because vLLM captures while kvring's threads work.
#include "fake.h"

#include <algorithm>

namespace {
enum Mode { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };
thread_local int thread_mode = GLOBAL;
}  // namespace

namespace fake {

// Is an unsafe call forbidden to this thread now? Then the captures that forbid it become invalid.
bool captures_forbid(Call &call) {
    if (thread_mode == RELAXED) return false;
    bool forbidden = false;
    for (auto &entry : call.fake.captures) {
        Capture &capture = *entry.second;
        bool own = capture.thread == std::this_thread::get_id() && capture.mode != RELAXED;
        bool others = capture.mode == GLOBAL && thread_mode == GLOBAL;
        if (!own && !others) continue;
        capture.invalid = true;
        forbidden = true;
    }
    return forbidden;
}

// Called when work is put on a stream: does a capture take it?
CUresult on_capturing(const std::shared_ptr<Stream> &stream, bool &captured) {
    captured = stream->capture != nullptr;
    if (captured) {
        stream->merged = false;
        return stream->capture->invalid ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
    }
    if (!stream->legacy) return CUDA_SUCCESS;
    // The legacy stream would have to wait for a blocking stream that captures.
    bool implicit = false;
    for (auto &entry : state().captures) {
        Capture &capture = *entry.second;
        if (capture.origin->context != stream->context || capture.origin->flags & 1) continue;
        capture.invalid = true;
        implicit = true;
    }
    return implicit ? CUDA_ERROR_STREAM_CAPTURE_IMPLICIT : CUDA_SUCCESS;
}

void end_capture_of(Stream &stream) {
    Capture *capture = stream.capture;
    if (!capture) return;
    capture->invalid = true;
    stream.capture = nullptr;
    auto &joined = capture->joined;
    for (size_t i = 0; i < joined.size(); ++i) {
        if (capture->origin.get() == &stream) joined[i]->capture = nullptr;
    }
    joined.erase(std::remove_if(joined.begin(), joined.end(), [&](auto &one) { return one.get() == &stream; }),
                 joined.end());
    // Without its first stream nobody could end the capture.
    if (capture->origin.get() == &stream) state().captures.erase(stream.handle);
}

// Called when a stream is to wait for a record: handles the cases in which either of them is captured.
CUresult wait_captured(const std::shared_ptr<Stream> &stream, const std::shared_ptr<Record> &record, bool &captured) {
    captured = true;
    State &fake = state();
    if (stream->capture) {
        if (stream->capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        if (record->capture != stream->capture->id) {
            stream->capture->invalid = true;
            return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
        }
        for (auto &joined : stream->capture->joined) {
            if (joined.get() == record->stream) joined->merged = true;
        }
        return CUDA_SUCCESS;
    }
    if (!record->capture) {
        captured = false;
        return CUDA_SUCCESS;
    }
    for (auto &entry : fake.captures) {
        Capture &capture = *entry.second;
        if (capture.id != record->capture) continue;
        if (!fake.config.join) return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
        stream->capture = &capture;
        stream->merged = false;
        capture.joined.push_back(stream);
        return CUDA_SUCCESS;
    }
    // The capture has ended: nobody can wait for an event that was recorded in it.
    return CUDA_ERROR_CAPTURED_EVENT;
}

}  // namespace fake

using namespace fake;

EXPORT CUresult cuThreadExchangeStreamCaptureMode(int *mode) {
    ENTER(cuThreadExchangeStreamCaptureMode, NOTHING);
    if (!mode || *mode < GLOBAL || *mode > RELAXED) return CUDA_ERROR_INVALID_VALUE;
    std::swap(*mode, thread_mode);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamBeginCapture_v2(CUstream handle, int mode) {
    ENTER(cuStreamBeginCapture, CONTEXT);
    if (mode < GLOBAL || mode > RELAXED) return CUDA_ERROR_INVALID_VALUE;
    std::shared_ptr<Stream> stream;
    if (CUresult result = find_stream(call, handle, stream)) return result;
    if (stream->legacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
    std::unique_ptr<Capture> capture(new Capture);
    capture->id = ++fake.next;
    capture->mode = mode;
    capture->thread = std::this_thread::get_id();
    capture->origin = stream;
    stream->capture = capture.get();
    fake.captures[handle] = std::move(capture);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamEndCapture(CUstream handle, CUgraph *graph) {
    ENTER(cuStreamEndCapture, CONTEXT);
    if (!graph) return CUDA_ERROR_INVALID_VALUE;
    *graph = nullptr;
    std::shared_ptr<Stream> stream;
    if (CUresult result = find_stream(call, handle, stream)) return result;
    if (!stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
    auto entry = fake.captures.find(handle);
    if (entry == fake.captures.end()) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    Capture &capture = *entry->second;
    if (capture.mode != RELAXED && capture.thread != std::this_thread::get_id()) {
        return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    }
    CUresult result = capture.invalid ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
    for (auto &joined : capture.joined) {
        if (!result && !joined->merged) result = CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
        joined->capture = nullptr;
    }
    stream->capture = nullptr;
    fake.captures.erase(entry);
    if (result) return result;
    *graph = fake.handle();
    fake.graphs.insert(*graph);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGraphDestroy(CUgraph graph) {
    ENTER(cuGraphDestroy, INIT | ENDS);
    return fake.graphs.erase(graph) ? call.dead() : CUDA_ERROR_INVALID_VALUE;
}

static int status_of(const Stream &stream) {
    if (!stream.capture) return 0;
    return stream.capture->invalid ? 2 : 1;
}

static CUresult capture_info(Call &call, CUstream handle, int *status, uint64_t *id) {
    std::shared_ptr<Stream> stream;
    if (CUresult result = find_stream(call, handle, stream)) return result;
    *status = status_of(*stream);
    if (id) *id = stream->capture ? stream->capture->id : 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamIsCapturing(CUstream handle, int *status) {
    ENTER(cuStreamIsCapturing, CONTEXT);
    // For the legacy stream the call breaks no capture, and does not say whose capture it is.
    for (auto &entry : fake.captures) {
        const Stream &origin = *entry.second->origin;
        bool legacy = reinterpret_cast<uintptr_t>(handle) < 2;
        if (legacy && origin.context == call.context && !(origin.flags & 1)) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    }
    return capture_info(call, handle, status, nullptr);
}

EXPORT CUresult cuStreamGetCaptureInfo_v2(CUstream handle, int *status, uint64_t *id, CUgraph *graph,
                                          const void **nodes, size_t *count) {
    ENTER(cuStreamGetCaptureInfo, CONTEXT);
    // There are no unfinished graphs to look at.
    if (graph) *graph = nullptr;
    if (nodes) *nodes = nullptr;
    if (count) *count = 0;
    return capture_info(call, handle, status, id);
}

EXPORT CUresult cuStreamGetCaptureInfo_v3(CUstream handle, int *status, uint64_t *id, CUgraph *graph,
                                          const void **nodes, const void **edges, size_t *count) {
    if (edges) *edges = nullptr;
    return cuStreamGetCaptureInfo_v2(handle, status, id, graph, nodes, count);
}
