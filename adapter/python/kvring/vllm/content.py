"""A digest of the content of files. It is equal for equal content, wherever the files lie and however old they are: no time and
no path counts.

Checkpoints are too large to be read whole at each start of vLLM. So of weights this reads

* nothing, where a file is a link to a blob of Hugging Face's cache: the blob's name is its digest;
* all, where all of them together are small (adapters, mostly);
* else of a safetensors file its header (names, types, shapes, places) and one block of each tensor, and of a file of another
  kind its two ends (a PyTorch file's end lists the checksums of its parts) and blocks that are spread evenly.

Other files (configurations, code) are read whole. A change of weights goes unnoticed if it leaves every header and every block
that is read as it was.

How much is read is bounded, whatever a folder holds, because vLLM's start waits for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

BLOCK = 4096
BLOCKS_MAX = 4096
"""The most blocks of tensors that are read; weights that are no larger than so many blocks are read whole."""

_END = 64 * 1024
"""Bytes read at each end of weights that are no safetensors files; fewer where there are hundreds of such files."""
FILES_MAX = 10_000
"""The most files in a model's folder and in those just below it."""
READ_WHOLE_MAX = 64 << 20
"""The most bytes of all files together that are no weights; and, apart from that, of all headers of safetensors files: the files
after that are read like those of another kind. (The largest checkpoints have some 15 MB of each.)"""
_NOT_LOADED = (".", "checkpoint-", "global_step", "original")
"""vLLM loads nothing from folders whose names begin like this: hidden ones, steps of a training, Llama's weights in their first
format."""
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_LENGTH = 8


class Unknown(Exception):
    """The content of files, or something else that decides the bytes of KV, cannot be known. The text says what, and why."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A range of a file that is read."""

    name: str
    offset: int
    length: int


def digest(weights: Mapping[str, Path], others: Mapping[str, Path] | None = None) -> str:
    """The digest of files, given by name: of the names and the contents. Raises `OSError` where a file cannot be read, and
    `Unknown` where there is too much to read."""
    size = sum(path.stat().st_size for path in (others or {}).values())
    if size > READ_WHOLE_MAX:
        raise Unknown(
            f"the configurations and the code of the model have {size} bytes, and more than {READ_WHOLE_MAX} are not read"
        )
    found = hashlib.sha256()
    sizes: dict[str, int] = {}
    for name, path in sorted(weights.items()):
        blob = _blob(path)
        if blob is None:
            sizes[name] = path.stat().st_size
        _add(found, "size" if blob is None else "blob", name, (blob or str(sizes[name])).encode())
    for name, path in sorted((others or {}).items()):
        _add(found, "all", name, path.read_bytes())
    for piece, data in _read(weights, _pieces(weights, sizes)):
        _add(found, f"{piece.offset}", piece.name, data)
    return found.hexdigest()


def changed_since(files: Iterable[Path], time_s: float) -> Path | None:
    """A file that was written, replaced or given another owner since `time_s`, or whose link was; `None` if there is none. Blobs
    are left out, because their names are their digests."""
    return next(
        (path for path in files if _blob(path) is None and max(path.stat().st_ctime, path.lstat().st_ctime) > time_s), None
    )


def look(folder: Path) -> dict[str, Path]:
    """The files in a folder and in those just below it, by their names from there: vLLM's loaders look no deeper. Raises
    `Unknown` where there are too many."""
    found, folders = _list(folder, FILES_MAX)
    for below in folders:
        if below.name.startswith(_NOT_LOADED):
            continue
        # vLLM finds nothing either in a folder that this user may not list (a volume's `lost+found`).
        with contextlib.suppress(PermissionError):
            found |= {f"{below.name}/{name}": path for name, path in _list(below, FILES_MAX - len(found))[0].items()}
    return found


def _list(folder: Path, most: int) -> tuple[dict[str, Path], list[Path]]:
    """The files of a folder, by name, and its folders."""
    files: dict[str, Path] = {}
    folders: list[Path] = []
    for path in folder.iterdir():
        if len(files) + len(folders) >= most:
            raise Unknown(f"there are more than {FILES_MAX} files in {folder} and beside it")
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            # A link that leads nowhere: vLLM loads nothing by it.
            continue
        except OSError:
            # This fails later, when the file is read, and only if it is needed.
            mode = stat.S_IFREG
        if stat.S_ISREG(mode):
            files[path.name] = path
        elif stat.S_ISDIR(mode):
            folders.append(path)
    return files, folders


def _add(found: hashlib._Hash, kind: str, name: str, data: bytes) -> None:
    """Adds a record to a digest, with the lengths of its parts: so no two sequences of records give the same bytes."""
    for part in (kind.encode(), name.encode(errors="surrogateescape"), data):
        found.update(len(part).to_bytes(_LENGTH, "little"))
        found.update(part)


def _blob(path: Path) -> str | None:
    """The content's digest, where the file's name tells it: in Hugging Face's cache `snapshots/COMMIT/FILE` links to
    `blobs/DIGEST`."""
    if not path.is_symlink():
        return None
    target = Path(os.path.realpath(path, strict=True))
    return target.name if target.parent.name == "blobs" and _BLOB.fullmatch(target.name) else None


def _pieces(files: Mapping[str, Path], weights: Mapping[str, int]) -> list[_Piece]:
    """The ranges of weights that are read."""
    if sum(weights.values()) <= BLOCK * BLOCKS_MAX:
        return [_Piece(name, 0, size) for name, size in weights.items()]
    heads: list[_Piece] = []
    blocks: list[_Piece] = []
    opaque: dict[str, int] = {}
    headers_left = READ_WHOLE_MAX
    for name, size in weights.items():
        header = _tensors(files[name], size, headers_left) if name.endswith(".safetensors") else None
        if header is None:
            opaque[name] = size
            continue
        start, tensors = header
        headers_left -= start
        heads.append(_Piece(name, 0, start))
        for begin, end in tensors:
            # The block in the tensor's middle, or all of a small tensor.
            length = min(BLOCK, end - begin)
            middle = start + begin + (end - begin - length) // 2
            blocks.append(_Piece(name, middle, length))
    step = max(BLOCK, -(-sum(opaque.values()) // BLOCKS_MAX))
    most = max(BLOCK, READ_WHOLE_MAX // (2 * max(1, len(opaque))))
    for name, size in opaque.items():
        end = min(_END, most, size)
        heads += [_Piece(name, 0, end), _Piece(name, size - end, end)]
        blocks += [_Piece(name, at, min(BLOCK, size - at)) for at in range(0, size, step)]
    return heads + _spread(blocks)


def _spread(blocks: list[_Piece]) -> list[_Piece]:
    """At most `BLOCKS_MAX` of the blocks, spread evenly."""
    if len(blocks) <= BLOCKS_MAX:
        return blocks
    return [blocks[index * len(blocks) // BLOCKS_MAX] for index in range(BLOCKS_MAX)]


def _tensors(path: Path, size: int, most: int) -> tuple[int, list[tuple[int, int]]] | None:
    """Where a safetensors file's data begins, and where in that each tensor lies. `None` where it is no such file, or its header
    has more than `most` bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        if length > min(most, size - _LENGTH):
            return None
        data = file.read(length)
    start = _LENGTH + length
    try:
        places = [entry["data_offsets"] for name, entry in json.loads(data).items() if name != "__metadata__"]
        tensors = sorted((int(begin), int(end)) for begin, end in places)
    except Exception:
        # Nobody can load this as a safetensors file.
        return None
    inside = all(0 <= begin <= end <= size - start for begin, end in tensors)
    return (start, tensors) if inside else None


def _read(files: Mapping[str, Path], pieces: list[_Piece]) -> Iterator[tuple[_Piece, bytes]]:
    """Yields the pieces with their bytes. Asks for all before it reads the first, so that the disk works on all of them at once:
    a thousand blocks that are not in memory yet take 30 ms instead of 150, without threads."""
    by_file: dict[str, list[_Piece]] = {}
    for piece in pieces:
        by_file.setdefault(piece.name, []).append(piece)
    for name, wanted in by_file.items():
        with _opened(files[name]) as descriptor:
            for piece in wanted:
                os.posix_fadvise(descriptor, piece.offset, piece.length, os.POSIX_FADV_WILLNEED)
    for name, wanted in by_file.items():
        with _opened(files[name]) as descriptor:
            for piece in wanted:
                yield piece, _whole(descriptor, piece)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _whole(descriptor: int, piece: _Piece) -> bytes:
    """Reads all of a piece: one read may bring less than it was asked for. A file that was cut short meanwhile gives fewer bytes,
    and so another digest."""
    data = os.pread(descriptor, piece.length, piece.offset)
    while len(data) < piece.length:
        more = os.pread(descriptor, piece.length - len(data), piece.offset + len(data))
        if not more:
            break
        data += more
    return data
