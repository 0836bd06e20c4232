"""A digest of files: every difference in what they hold makes another one, and nothing else does."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest

from kvring.vllm import content

TENSOR = 8 * content.BLOCK


@pytest.fixture
def large(monkeypatch):
    """Files of these tests are too large to be read whole, as checkpoints of many gigabytes are."""
    monkeypatch.setattr(content, "BLOCKS_MAX", 32)


def write(path: Path, tensors: dict[str, bytes]) -> Path:
    """A safetensors file."""
    header, at = {}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensors.values()))
    return path


def checkpoint(folder: Path, other: int | None = None, count: int = 24) -> dict[str, Path]:
    """Two files of tensors; `other`: this tensor has another content, of the same name, type and shape."""
    folder.mkdir(exist_ok=True)
    tensors = [bytes([200 if index == other else index]) * TENSOR for index in range(count)]
    files = {}
    for shard in range(2):
        name = f"model-{shard}.safetensors"
        files[name] = write(folder / name, {f"t{index}": tensors[index] for index in range(shard, count, 2)})
    return files


def test_checkpoints_that_differ_in_one_tensor_are_two(large, tmp_path) -> None:
    """Names, sizes, headers and times of change may be equal, as in a mount that is filled anew, or after `rsync -t`."""
    seen = {content.digest(checkpoint(tmp_path / "m", other)) for other in (None, *range(24))}
    assert len(seen) == 25
    before = (tmp_path / "m" / "model-0.safetensors").stat().st_size
    assert before > content.BLOCK * content.BLOCKS_MAX, "or it would be read whole"


@pytest.mark.parametrize("shard", [0, 1])
def test_the_header_of_every_file_counts(large, tmp_path, shard) -> None:
    """Two tensors have changed names: all sizes and places are the same, and the bytes of all tensors."""
    files = checkpoint(tmp_path / "m")
    found, path = content.digest(files), files[f"model-{shard}.safetensors"]
    one, other = (f'"t{index}"'.encode() for index in (shard, shard + 2))
    path.write_bytes(other.join(part.replace(other, one) for part in path.read_bytes().split(one)))
    assert content.digest(files) != found


def test_small_files_are_read_whole(tmp_path) -> None:
    files = {"adapter_model.safetensors": write(tmp_path / "a", {"t": bytes(TENSOR)})}
    seen = set()
    for at in (0, 1, TENSOR // 3, TENSOR - 1):
        write(tmp_path / "a", {"t": bytes(at) + b"\1" + bytes(TENSOR - at - 1)})
        seen.add(content.digest(files))
    assert len(seen) == 4


def test_a_copy_and_a_file_that_was_touched_are_the_same(large, tmp_path) -> None:
    files = checkpoint(tmp_path / "m")
    found = content.digest(files, {"config.json": files["model-0.safetensors"]})
    shutil.copytree(tmp_path / "m", tmp_path / "copy")
    for name in files:
        os.utime(tmp_path / "m" / name, ns=(1, 1))
    assert content.digest(files, {"config.json": files["model-0.safetensors"]}) == found
    there = {name: tmp_path / "copy" / name for name in files}
    assert content.digest(there, {"config.json": there["model-0.safetensors"]}) == found


def test_names_count_and_nothing_runs_together(tmp_path) -> None:
    (tmp_path / "a").write_bytes(b"xy")
    (tmp_path / "b").write_bytes(b"x")
    (tmp_path / "c").write_bytes(b"y")
    a, b, c = (tmp_path / name for name in "abc")
    weights = [({"n": a}, {}), ({"m": a}, {}), ({"n": b}, {"m": c}), ({"n": c}, {"m": b}), ({"n": b, "m": c}, {})]
    pairs = [*weights, ({}, {"n": a}), ({}, {"nx": c}), ({}, {"n": b, "y": c})]
    assert len({content.digest(*pair) for pair in pairs}) == len(pairs)


def test_of_too_many_tensors_some_are_read_that_are_spread_evenly(large, tmp_path) -> None:
    count = 4 * content.BLOCKS_MAX
    files = checkpoint(tmp_path / "m", count=count)
    found = content.digest(files)
    for path in files.values():
        start, tensors = content._tensors(path, path.stat().st_size, content.READ_WHOLE_MAX)
        noticed = []
        with path.open("r+b") as file:
            for begin, end in tensors:
                file.seek(start + begin)
                before = file.read(end - begin)
                file.seek(start + begin)
                file.write(bytes(byte ^ 1 for byte in before))
                file.flush()
                noticed.append(content.digest(files) != found)
                file.seek(start + begin)
                file.write(before)
        assert all(any(noticed[at : at + 4]) for at in range(0, len(noticed), 4)) and not all(noticed)


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_of_another_format_the_ends_and_blocks_are_read(large, tmp_path, at) -> None:
    """A PyTorch file has its table of contents, with checksums, at its end."""
    size = 64 * content.BLOCK
    place = [0, size // 2, size - 1, size - content.BLOCK][at]
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(bytes(size))
    found = content.digest({path.name: path})
    path.write_bytes(bytes(place) + b"\1" + bytes(size - place - 1))
    assert content.digest({path.name: path}) != found


def test_a_link_to_a_blob_is_known_by_the_blobs_name(tmp_path) -> None:
    """Hugging Face's cache: nothing is read, and every snapshot that links to it has the same."""

    def cached(repository: str, digest: str, data: bytes = b"") -> dict[str, Path]:
        blob = tmp_path / repository / "blobs" / digest
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link = tmp_path / repository / "snapshots" / "commit" / "model.safetensors"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        return {"model.safetensors": link}

    found = content.digest(cached("a", "0" * 64))
    assert content.digest(cached("b", "0" * 64, b"not looked at")) == found
    assert content.digest(cached("a", "1" * 64)) != found
    # Only a name that has the form of a digest is taken for one.
    assert content.digest(cached("a", "model", b"one")) != content.digest(cached("a", "model", b"two"))
    (tmp_path / "link").symlink_to(tmp_path / "a" / "blobs" / "model")
    assert content.digest({"n": tmp_path / "link"}) == content.digest({"n": tmp_path / "a" / "blobs" / "model"})


@pytest.mark.parametrize(
    "head",
    [
        struct.pack("<Q", 2**64 - 1),
        struct.pack("<Q", 10) + b"{nonsense}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 23) + b'{"t":{"data_offsets":1}}',
        struct.pack("<Q", 35) + b'{"t":{"data_offsets":[0,999999999]}}',
        struct.pack("<Q", 29) + b'{"t":{"data_offsets":[-9,4]}} ',
        struct.pack("<Q", 60_000) + b"[" * 60_000,
        struct.pack("<Q", 36) + b'{"t":{"data_offsets":[0,Infinity]}}'.ljust(36),
        b"",
    ],
)  # fmt: skip
def test_a_broken_safetensors_file_is_read_as_any_other_file(large, tmp_path, head) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(head + bytes(64 * content.BLOCK))
    found = content.digest({path.name: path})
    path.write_bytes(head + bytes(32 * content.BLOCK) + b"\1" * content.BLOCK + bytes(31 * content.BLOCK))
    assert content.digest({path.name: path}) != found


def test_no_more_bytes_of_headers_are_read_than_the_limit(large, tmp_path, monkeypatch) -> None:
    """A folder may be full of files with headers of the format's limit: gigabytes would be parsed."""
    parsed: list[str] = []
    loads = json.loads
    monkeypatch.setattr(content.json, "loads", lambda data: parsed.append(data) or loads(data))
    monkeypatch.setattr(content, "READ_WHOLE_MAX", 2000)
    files = {f"{n:02}.safetensors": write(tmp_path / f"{n:02}", {"t": bytes([n]) * TENSOR}) for n in range(60)}
    found = content.digest(files)
    assert 0 < sum(map(len, parsed)) <= 2000
    write(tmp_path / "59", {"t": bytes(TENSOR)})
    assert content.digest(files) != found, "the files after the limit are read as any other"


def test_the_size_of_a_checkpoint_does_not_matter(tmp_path) -> None:
    """A terabyte is as many blocks as a gigabyte."""
    reads: list[int] = []
    read = os.pread
    files = {}
    for name in ("a.safetensors", "b.bin"):
        files[name] = tmp_path / name
        files[name].write_bytes(b"")
        os.truncate(files[name], 1 << 40)
    os.pread = lambda descriptor, length, at: reads.append(length) or read(descriptor, length, at)
    try:
        content.digest(files)
    finally:
        os.pread = read
    assert sum(reads) <= content.BLOCK * content.BLOCKS_MAX + 4 * 64 * 1024


def test_a_file_that_cannot_be_read_is_an_error_and_not_left_out(tmp_path) -> None:
    for weights, others in (({"a": tmp_path / "none"}, {}), ({}, {"a": tmp_path / "none"})):
        with pytest.raises(OSError):
            content.digest(weights, others)
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(OSError):
        content.digest({"a": tmp_path / "gone"})


def test_a_folder_is_looked_at_as_deep_as_vllm_does(tmp_path) -> None:
    left_out = ("sub/deep/c.bin", ".cache/d.bin", "checkpoint-500/e.bin", "global_step9/g.pt", "original/consolidated.00.pt")
    for name in ("a.bin", "sub/b.bin", "sub/.f.json", *left_out):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "dangling.bin").symlink_to("nowhere")
    (tmp_path / "self").symlink_to(".")
    assert (
        {"a.bin", "sub/b.bin", "self/a.bin"} <= set(content.look(tmp_path)) <= {"a.bin", "sub/b.bin", "sub/.f.json", "self/a.bin"}
    )


@pytest.mark.parametrize("place", ["", "sub/"])
def test_a_link_that_may_not_be_followed_hides_nothing_beside_it(tmp_path, monkeypatch, place) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.bin", "z.bin", "locked.bin"):
        (tmp_path / f"{place}{name}").touch()
    (tmp_path / "lost+found").mkdir()
    stat, listed = os.stat, os.listdir

    def guarded(path, *args, **more):
        if Path(path).name == "locked.bin":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **more)

    def closed(path="."):
        if Path(path).name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "stat", guarded)
    monkeypatch.setattr(os, "listdir", closed)
    files = content.look(tmp_path)
    assert set(files) == {f"{place}{name}" for name in ("a.bin", "z.bin", "locked.bin")}
    with pytest.raises(PermissionError):
        content.digest(files)


def test_a_folder_is_not_looked_at_for_ever(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(content, "FILES_MAX", 10)
    (tmp_path / "sub").mkdir()
    for number in range(9):
        (tmp_path / "sub" / f"{number}.bin").touch()
    assert len(content.look(tmp_path)) == 9
    (tmp_path / "sub" / "9.bin").touch()
    (tmp_path / "a.bin").touch()
    with pytest.raises(content.Unknown, match="10"):
        content.look(tmp_path)
