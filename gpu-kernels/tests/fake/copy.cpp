// Copies, and work like that of torch's kernels.
#include "fake.h"

#include <algorithm>
#include <cstring>

namespace fake {
namespace {

struct Piece {
    CUdeviceptr to = 0;
    CUdeviceptr from = 0;
    size_t bytes = 0;
    Kind to_kind = Kind::PAGEABLE;
    Kind from_kind = Kind::PAGEABLE;
    // The bytes of pageable memory at the time of the call.
    std::shared_ptr<std::vector<char>> staged;
};

// Where an address must be, by the call's name.
enum class Side { HOST, DEVICE, ANY };

bool fits(Kind kind, Side side) {
    if (kind == Kind::CROSSING) return false;
    bool on_device = kind == Kind::DEVICE || kind == Kind::ALIAS;
    // Pinned memory has its own address on the device too, if the device says so.
    if (kind == Kind::PINNED && state().config.host_pointers) return true;
    return side == Side::ANY || on_device == (side == Side::DEVICE);
}

char *at(CUdeviceptr address) { return reinterpret_cast<char *>(address); }

bool prepare(Piece &piece, Side to, Side from) {
    if (!piece.to || !piece.from) return false;
    piece.to_kind = classify(piece.to, piece.bytes);
    piece.from_kind = classify(piece.from, piece.bytes);
    if (!fits(piece.to_kind, to) || !fits(piece.from_kind, from)) return false;
    // The driver has read pageable memory by the time the call returns.
    if (piece.from_kind == Kind::PAGEABLE) {
        piece.staged = std::make_shared<std::vector<char>>(at(piece.from), at(piece.from) + piece.bytes);
    }
    return true;
}

// Are the addresses still of the same kinds? Pageable memory may have been registered since the call, because the driver copies
// it through buffers of its own.
bool still(const Piece &piece) {
    auto same = [&](CUdeviceptr address, Kind kind) {
        return kind == Kind::PAGEABLE || classify(address, piece.bytes) == kind;
    };
    return same(piece.to, piece.to_kind) && same(piece.from, piece.from_kind);
}

void move(const Piece &piece) {
    const char *from = piece.staged ? piece.staged->data() : at(piece.from);
    // The copy has two steps, so that a thread that looks too early may find only half of it.
    size_t half = piece.bytes / 2;
    std::memmove(at(piece.to), from, half);
    if (state().config.delay_us && half >= 4096) sleep_us(1);
    std::memmove(at(piece.to) + half, from + half, piece.bytes - half);
}

CUresult put(Call &call, CUstream handle, std::vector<Piece> pieces) {
    std::shared_ptr<Stream> stream;
    if (CUresult result = find_stream(call, handle, stream)) return result;
    // A call that copies into pageable memory returns when the copy has ended.
    auto waits = [](const Piece &piece) { return piece.to_kind == Kind::PAGEABLE; };
    bool wait = std::any_of(pieces.begin(), pieces.end(), waits);
    Op op;
    auto shared = std::make_shared<std::vector<Piece>>(std::move(pieces));
    op.valid = [shared] { return std::all_of(shared->begin(), shared->end(), still); };
    op.run = [shared] {
        for (auto &piece : *shared) move(piece);
        return CUDA_SUCCESS;
    };
    return submit(call, stream, std::move(op), wait);
}

CUresult copy(Call &call, CUdeviceptr to, Side to_side, CUdeviceptr from, Side from_side, size_t bytes, CUstream stream) {
    if (!bytes) return CUDA_SUCCESS;
    Piece piece;
    piece.to = to;
    piece.from = from;
    piece.bytes = bytes;
    if (!prepare(piece, to_side, from_side)) return CUDA_ERROR_INVALID_VALUE;
    return put(call, stream, {piece});
}

// Puts work on a stream that reads or writes device memory, as a kernel of torch does.
CUresult compute(Call &call, CUstream handle, CUdeviceptr address, size_t bytes, unsigned delay_us,
                 std::function<void()> work) {
    Kind kind = classify(address, bytes);
    if (!fits(kind, Side::DEVICE)) return CUDA_ERROR_INVALID_VALUE;
    std::shared_ptr<Stream> stream;
    if (CUresult result = find_stream(call, handle, stream)) return result;
    Op op;
    op.delay_us = delay_us;
    op.valid = [=] { return classify(address, bytes) == kind; };
    op.run = [=] {
        work();
        return CUDA_SUCCESS;
    };
    return submit(call, stream, std::move(op), false);
}

CUdeviceptr number(const void *pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

}  // namespace

// The batch copy of CUDA 12.8. It takes the attributes that kvring gives: one for all copies, which begins with the order in which
// sources are read, here that of the stream. It does not give the index of the copy that failed.
CUresult batch_copy(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count, void *attributes,
                    size_t *attribute_indices, size_t attribute_count, size_t *, CUstream stream) {
    ENTER(cuMemcpyBatchAsync, CONTEXT);
    const int stream_order = 1;
    if (!dsts || !srcs || !sizes || !count || !attributes || !attribute_indices) return CUDA_ERROR_INVALID_VALUE;
    if (attribute_count != 1 || attribute_indices[0]) return CUDA_ERROR_INVALID_VALUE;
    if (*static_cast<int *>(attributes) != stream_order) return CUDA_ERROR_NOT_SUPPORTED;
    // The driver does not allow it on the default streams.
    if (reinterpret_cast<uintptr_t>(stream) <= 2) return CUDA_ERROR_INVALID_VALUE;
    std::vector<Piece> pieces(count);
    for (size_t i = 0; i < count; ++i) {
        Piece &piece = pieces[i];
        piece.to = dsts[i];
        piece.from = srcs[i];
        piece.bytes = sizes[i];
        if (!sizes[i] || !prepare(piece, Side::ANY, Side::ANY)) return CUDA_ERROR_INVALID_VALUE;
    }
    // Within a batch there is no order.
    std::mt19937 random(unsigned(fake.calls["cuMemcpyBatchAsync"]));
    std::shuffle(pieces.begin(), pieces.end(), random);
    return put(call, stream, std::move(pieces));
}

}  // namespace fake

using namespace fake;

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    ENTER(cuMemcpyHtoDAsync, CONTEXT);
    return copy(call, to, Side::DEVICE, number(from), Side::HOST, bytes, stream);
}

EXPORT CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER(cuMemcpyDtoHAsync, CONTEXT);
    return copy(call, number(to), Side::HOST, from, Side::DEVICE, bytes, stream);
}

// Byte `i` of the pattern that `fake_cuda_fill` writes: it depends on the seed and the place, so that blocks of any size can be
// told apart.
static unsigned char pattern(unsigned seed, size_t i) {
    uint32_t x = seed * 0x9e3779b9u ^ uint32_t(i);
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    return static_cast<unsigned char>(x);
}

// Acts as a kernel of torch: `delay_us` after its turn comes, the stream writes the pattern of this seed.
EXPORT CUresult fake_cuda_fill(CUstream stream, CUdeviceptr to, size_t bytes, unsigned seed, unsigned delay_us) {
    ENTER(fake_cuda_fill, CONTEXT);
    return compute(call, stream, to, bytes, delay_us, [=] {
        for (size_t i = 0; i < bytes; ++i) at(to)[i] = char(pattern(seed, i));
    });
}

// Acts as a kernel of torch that reads: after the delay the stream copies the bytes that it finds into memory of the test, which
// must stay until then.
EXPORT CUresult fake_cuda_read(CUstream stream, CUdeviceptr from, size_t bytes, void *into, unsigned delay_us) {
    ENTER(fake_cuda_read, CONTEXT);
    return compute(call, stream, from, bytes, delay_us, [=] { std::memcpy(into, at(from), bytes); });
}
