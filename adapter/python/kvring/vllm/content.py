"""What files hold, told by a digest: equal for equal content, wherever it lies and since whenever. No time and no path counts.

Checkpoints are too large to be read whole at each start of vLLM. So of weights this reads

* nothing, where a file is a link to a blob of Hugging Face's cache: the blob's name is its digest;
* all, where all of them together are small (adapters, mostly);
* else of a safetensors file its header (names, types, shapes, places) and one block of each tensor, and of a file of another
  kind its two ends (a PyTorch file's end lists the checksums of what is in it) and blocks that are spread evenly.

Other files (configurations, code) are read whole. What this does not notice is a change of weights that leaves every header and
every block that is read as it was.

How much is read is bounded, whatever lies in a folder: vLLM's start waits for it.
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
"""Blocks of tensors that are read at most; weights that are no larger than that are read whole."""

_END = 64 * 1024
"""Bytes read at each end of weights whose format tells nothing; fewer where there are hundreds of such files."""
FILES_MAX = 10_000
"""Files in a model's folder and in those just below it."""
READ_WHOLE_MAX = 64 << 20
"""Bytes of all files that are no weights together; and of the headers of safetensors files, of which those that come later are
read as files of another kind are. (The largest checkpoints have some 15 MB of each.)"""
_NOT_LOADED = (".", "checkpoint-", "global_step", "original")
"""How folders begin that vLLM loads nothing from: hidden ones, the steps of a training, Llama's weights in their first format."""
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_LENGTH = 8


class Unknown(Exception):
    """What is in files, or what decides the bytes, cannot be told; the text says of what, and why."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes that are read of a file."""

    name: str
    offset: int
    length: int


def digest(weights: Mapping[str, Path], others: Mapping[str, Path] | None = None) -> str:
    """Of files by name: the name counts, and what is in the file. Raises `OSError` for what cannot be read, and `Unknown` for
    what is too much."""
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
    """A file that has been written, replaced or given another owner since then, or the link to it. A blob's name tells all."""
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
        # What this user may not list (a volume's `lost+found`), vLLM finds nothing in either.
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
            # A link that leads nowhere: nothing is loaded by it.
            continue
        except OSError:
            # Whoever needs this one fails when it is read; nobody else does.
            mode = stat.S_IFREG
        if stat.S_ISREG(mode):
            files[path.name] = path
        elif stat.S_ISDIR(mode):
            folders.append(path)
    return files, folders


def _add(found: hashlib._Hash, kind: str, name: str, data: bytes) -> None:
    """No two sequences of these give the same bytes."""
    for part in (kind.encode(), name.encode(errors="surrogateescape"), data):
        found.update(len(part).to_bytes(_LENGTH, "little"))
        found.update(part)


def _blob(path: Path) -> str | None:
    """The content's digest, where it is the name: in Hugging Face's cache `snapshots/COMMIT/FILE` links to `blobs/DIGEST`."""
    if not path.is_symlink():
        return None
    target = Path(os.path.realpath(path, strict=True))
    return target.name if target.parent.name == "blobs" and _BLOB.fullmatch(target.name) else None


def _pieces(files: Mapping[str, Path], weights: Mapping[str, int]) -> list[_Piece]:
    """What is read of weights."""
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
            # The block in its middle; of a small one, all.
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
    """At most so many, evenly."""
    if len(blocks) <= BLOCKS_MAX:
        return blocks
    return [blocks[index * len(blocks) // BLOCKS_MAX] for index in range(BLOCKS_MAX)]


def _tensors(path: Path, size: int, most: int) -> tuple[int, list[tuple[int, int]]] | None:
    """Of a safetensors file: where its data begins, and where in that each tensor lies. `None`: it is not one, or its header has
    more than `most` bytes."""
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
        # Whatever it is: nobody can load it as one.
        return None
    inside = all(0 <= begin <= end <= size - start for begin, end in tensors)
    return (start, tensors) if inside else None


def _read(files: Mapping[str, Path], pieces: list[_Piece]) -> Iterator[tuple[_Piece, bytes]]:
    """The pieces' bytes. All are asked for before the first is waited for, so that the disk has them all to do at once: a
    thousand blocks that are not in memory yet take 30 ms instead of 150, and no threads."""
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
    """One read may bring less than it was asked for; the file may have become shorter meanwhile, which is another content."""
    data = os.pread(descriptor, piece.length, piece.offset)
    while len(data) < piece.length:
        more = os.pread(descriptor, piece.length - len(data), piece.offset + len(data))
        if not more:
            break
        data += more
    return data
