// Capture of streams into graphs. Graphs hold nothing: captured work is dropped. The fake models which calls are allowed
// during a capture, and to which threads, because vLLM captures while kvring's threads work. In the driver a stream that waits
// for a captured event joins the capture. Here that is an error (ISOLATION), which shows a missing check at once.
#include "fake.h"

namespace {
enum Mode { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };
thread_local int thread_mode = GLOBAL;
}  // namespace

namespace fake {

// Is an unsafe call forbidden to this thread now? Then the captures that forbid it become invalid.
bool captures_forbid(Call &call) {
    if (thread_mode == RELAXED) return false;
    bool forbidden = false;
    for (auto &entry : call.fake.streams) {
        Capture *capture = entry.second->capture.get();
        if (!capture) continue;
        bool own = capture->thread == std::this_thread::get_id() && capture->mode != RELAXED;
        bool others = capture->mode == GLOBAL && thread_mode == GLOBAL;
        if (!own && !others) continue;
        capture->invalid = true;
        forbidden = true;
    }
    return forbidden;
}

// A blocking stream of the context that is being captured: the legacy stream would have to wait for it.
static Stream *captured_blocking_stream(const Context *context) {
    for (auto &entry : state().streams) {
        Stream &stream = *entry.second;
        if (stream.capture && stream.context == context && !(stream.flags & 1)) return &stream;
    }
    return nullptr;
}

// Called when work is put on a stream: does a capture take it?
CUresult on_capturing(const std::shared_ptr<Stream> &stream, bool &captured) {
    captured = stream->capture != nullptr;
    if (captured) return stream->capture->invalid ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
    Stream *blocking = stream->legacy ? captured_blocking_stream(stream->context) : nullptr;
    if (!blocking) return CUDA_SUCCESS;
    blocking->capture->invalid = true;
    return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
}

// Called when a stream is to wait for a record: handles the cases in which either of them is captured.
CUresult wait_captured(const std::shared_ptr<Stream> &stream, const std::shared_ptr<Record> &record, bool &captured) {
    captured = true;
    if (Capture *capture = stream->capture.get()) {
        if (capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        if (record->capture == capture->id) return CUDA_SUCCESS;
        capture->invalid = true;
        return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    captured = record->capture != 0;
    return captured ? CUDA_ERROR_STREAM_CAPTURE_ISOLATION : CUDA_SUCCESS;
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
    stream->capture.reset(new Capture{++fake.next, mode, std::this_thread::get_id(), false});
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamEndCapture(CUstream handle, void **graph) {
    ENTER(cuStreamEndCapture, CONTEXT);
    if (!graph) return CUDA_ERROR_INVALID_VALUE;
    *graph = nullptr;
    std::shared_ptr<Stream> stream;
    if (CUresult result = find_stream(call, handle, stream)) return result;
    if (!stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
    if (stream->capture->mode != RELAXED && stream->capture->thread != std::this_thread::get_id()) {
        return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    }
    bool invalid = stream->capture->invalid;
    stream->capture.reset();
    if (invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    *graph = fake.handle();
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamIsCapturing(CUstream handle, int *status) {
    ENTER(cuStreamIsCapturing, CONTEXT);
    std::shared_ptr<Stream> stream;
    if (CUresult result = find_stream(call, handle, stream)) return result;
    // For the legacy stream the call breaks no capture, and does not say whose capture it is.
    if (stream->legacy && captured_blocking_stream(call.context)) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    const int none = 0, active = 1, invalidated = 2;
    *status = !stream->capture ? none : stream->capture->invalid ? invalidated : active;
    return CUDA_SUCCESS;
}
