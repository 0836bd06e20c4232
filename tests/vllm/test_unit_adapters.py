"""LoRA adapters: the content that vLLM has loaded salts keys, and not the content of a folder now."""

import os
import shutil
from typing import Any

import pytest
from harness.support import worker_side
from vllm.config import LoRAConfig
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager

from kvring.vllm import adapters
from kvring.vllm.adapters import NOT_KNOWN, Adapters, LoadedAdapters, joined, salted
from kvring.vllm.metadata import KvringMetadata, KvringWorkerMetadata, Outcome, Store


@pytest.fixture(autouse=True)
def during(monkeypatch) -> list[Any]:
    """Functions that run while vLLM reads an adapter's files, one at each load."""
    happens: list[Any] = []
    monkeypatch.setattr(WorkerLoRAManager, "_load_adapter", lambda manager, request: happens and happens.pop(0)())
    return happens


class Vllm:
    """A vLLM of so many ranks: its workers' managers of adapters, and kvring's two sides."""

    def __init__(self, ranks: int = 1, **options: Any) -> None:
        self.scheduler = Adapters()
        self.workers = [LoadedAdapters() for _ in range(ranks)]
        for worker in self.workers:
            worker.watch()
        self.manager = LRUCacheWorkerLoRAManager.__new__(LRUCacheWorkerLoRAManager)
        self.manager.lora_config = LoRAConfig(**{"max_loras": 1, "lora_dtype": "float16"} | options)

    def load(self, request: LoRARequest) -> None:
        """vLLM loads an adapter, and tells all workers, which are in this process."""
        self.manager._load_adapter(request)

    def report(self) -> None:
        """The end of a step."""
        told = [KvringWorkerMetadata(adapters=worker.take_news()) for worker in self.workers]
        joined = told[0]
        for one in told[1:]:
            joined = joined.aggregate(one)
        for adapter in joined.adapters:
            self.scheduler.learn(adapter)

    def salt(self, request: LoRARequest) -> bytes:
        return self.scheduler.of(request).salt

    def loaded(self, request: LoRARequest) -> bytes:
        """Loads it; its salt in the next step."""
        self.load(request)
        self.report()
        return self.salt(request)


def lora(path: Any, **more: Any) -> LoRARequest:
    return LoRARequest(**{"lora_name": "l", "lora_int_id": 1, "lora_path": str(path)} | more)


def write(folder: Any, content: bytes) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


@pytest.fixture
def adapter(tmp_path) -> Any:
    return write(tmp_path / "adapter", b"one")


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The warnings."""
    lines: list[str] = []
    monkeypatch.setattr(adapters.logger, "warning", lambda text, *values: lines.append(text % values))
    return lines


def test_a_loras_content_is_part_of_the_key(adapter) -> None:
    assert Adapters().of(None) is None
    first = Vllm().loaded(lora(adapter))
    assert len(first) == 16 and first == Vllm().loaded(lora(adapter))
    # After a restart: the same name, path, size and time of change.
    path = adapter / "adapter_model.safetensors"
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = Vllm().loaded(lora(adapter))
    assert second != first
    (adapter / "adapter_config.json").write_text('{"lora_alpha": 2}')
    assert Vllm().loaded(lora(adapter)) not in (first, second)
    assert Vllm().loaded(lora(adapter, is_3d_lora_weight=True)) != Vllm().loaded(lora(adapter))


def test_touched_files_and_others_beside_them_change_nothing(adapter, tmp_path) -> None:
    first = Vllm().loaded(lora(adapter))
    os.utime(adapter / "adapter_model.safetensors", ns=(1, 1))
    (adapter / "training_args.bin").write_bytes(b"x")
    (adapter / "README.json").write_text("x")
    assert Vllm().loaded(lora(adapter)) == first
    shutil.copytree(adapter, tmp_path / "copy")
    assert Vllm().loaded(lora(tmp_path / "copy", lora_int_id=7)) == first


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["o_proj"]},
        {"lora_dtype": "bfloat16"},
        {"fully_sharded_loras": True},
        {"enable_tower_connector_lora": True},
        {"enable_moe_shared_loras": True},
    ],
)
def test_options_that_decide_what_vllm_makes_of_an_adapter_are_part_of_the_key(adapter, options) -> None:
    assert Vllm().loaded(lora(adapter)) != Vllm(**options).loaded(lora(adapter))
    assert Vllm().loaded(lora(adapter)) == Vllm(max_loras=2, max_cpu_loras=8, max_lora_rank=64).loaded(lora(adapter))


def test_an_adapter_is_not_known_before_vllm_has_loaded_and_reported_it(adapter) -> None:
    vllm = Vllm()
    assert vllm.salt(lora(adapter)) == NOT_KNOWN
    vllm.load(lora(adapter))
    assert vllm.salt(lora(adapter)) == NOT_KNOWN
    vllm.report()
    assert vllm.salt(lora(adapter)) != NOT_KNOWN
    assert vllm.salt(lora(adapter, lora_name="m")) == vllm.salt(lora("elsewhere")) == NOT_KNOWN


def test_the_content_at_the_load_counts_and_not_that_at_the_request(adapter) -> None:
    """`load_lora_adapter`, then other files, then the first request."""
    vllm = Vllm()
    vllm.load(lora(adapter))
    write(adapter, b"two")
    vllm.report()
    write(adapter, b"one")
    assert vllm.salt(lora(adapter)) == Vllm().loaded(lora(adapter))


@pytest.mark.parametrize(
    "again", [{"load_inplace": True}, {}, {"lora_int_id": 2}], ids=["in place", "after it was evicted", "under another number"]
)
def test_an_adapter_that_was_loaded_with_two_contents_is_not_known_any_more(adapter, again, said) -> None:
    """vLLM finds the KV of the earlier one in its own prefix cache, so what it computes may rest on either."""
    vllm = Vllm(ranks=2)
    assert vllm.loaded(lora(adapter)) != NOT_KNOWN
    announced = vllm.scheduler.of(lora(adapter))
    assert all(worker.holds(announced) for worker in vllm.workers)
    write(adapter, b"two")
    vllm.load(lora(adapter, **again))
    # The workers do not need the scheduler's side for that, which has announced this store before it knew.
    assert not any(worker.holds(announced) for worker in vllm.workers) and not said
    vllm.report()
    assert vllm.salt(lora(adapter)) == vllm.salt(lora(adapter, **again)) == NOT_KNOWN
    assert len(said) == 1 and str(adapter) in said[0] and "another path" in said[0]
    write(adapter, b"one")
    assert vllm.loaded(lora(adapter, **again)) == NOT_KNOWN, "what was computed meanwhile is still in vLLM's cache"
    assert not any(worker.holds(announced) for worker in vllm.workers)
    assert vllm.loaded(lora(adapter, lora_name="another", lora_int_id=3)) != NOT_KNOWN
    assert len(said) == 1


def test_an_adapter_that_is_loaded_again_with_the_same_content_stays_known(adapter, said) -> None:
    vllm = Vllm(ranks=2)
    first = vllm.loaded(lora(adapter))
    for again in (lora(adapter), lora(adapter, load_inplace=True), lora(adapter, lora_int_id=2)):
        assert vllm.loaded(again) == first and not said
        assert all(not worker.take_news() for worker in vllm.workers)


def test_files_that_change_while_vllm_loads_them_tell_nothing(adapter, during, said) -> None:
    vllm = Vllm()
    during.append(lambda: write(adapter, b"two"))
    assert vllm.loaded(lora(adapter)) == vllm.loaded(lora(adapter)) == NOT_KNOWN
    assert len(said) == 1


@pytest.mark.parametrize("path", ["org/lora", "/nowhere"])
def test_an_adapter_that_is_in_no_folder_is_not_known(path, said) -> None:
    """A repository, of which vLLM fetches what it holds at that time; and an adapter that somebody has put into memory."""
    vllm = Vllm(ranks=2)
    assert vllm.loaded(lora(path)) == vllm.loaded(lora(path)) == NOT_KNOWN
    assert len(said) == 1 and "folder" in said[0]


def test_an_adapter_that_cannot_be_loaded_changes_nothing(adapter, during) -> None:
    vllm = Vllm()
    first = vllm.loaded(lora(adapter))

    def fails() -> None:
        raise FileNotFoundError

    write(adapter, b"two")
    during.append(fails)
    with pytest.raises(FileNotFoundError):
        vllm.load(lora(adapter, load_inplace=True))
    vllm.report()
    assert vllm.salt(lora(adapter)) == first


def test_a_name_at_another_path_is_another_one(adapter, tmp_path) -> None:
    """vLLM advises to load changed weights from another folder, in place of the earlier ones (under their number)."""
    vllm = Vllm()
    first = vllm.loaded(lora(adapter))
    old = vllm.scheduler.of(lora(adapter))
    there = lora(write(tmp_path / "there", b"two"), load_inplace=True)
    assert vllm.loaded(there) not in (first, NOT_KNOWN)
    # Requests that began with the earlier one go on with this one's weights.
    assert not vllm.workers[0].holds(old) and vllm.salt(lora(adapter)) == NOT_KNOWN


def test_two_adapters_of_one_number_are_not_known(adapter, tmp_path) -> None:
    """vLLM goes by the number: a request for the second adapter may have been computed with the first one."""
    vllm = Vllm()
    vllm.loaded(lora(adapter))
    second = lora(write(tmp_path / "second", b"two"), lora_name="second")
    assert vllm.loaded(second) == NOT_KNOWN == vllm.salt(lora(adapter))


def test_a_worker_stores_nothing_that_was_computed_with_another_content(adapter, monkeypatch) -> None:
    """The store was announced in the step in which vLLM loads the adapter: the scheduler's side cannot know yet."""
    vllm = Vllm()
    vllm.loaded(lora(adapter))
    side, recorder = worker_side(monkeypatch)
    side.adapters = vllm.workers[0]

    def announce(job: int, request: Any) -> Store:
        return Store(job, f"r{job}", (1, job), None, [bytes(16)], [3], vllm.scheduler.of(request))

    side.start_stores(KvringMetadata(stores=[announce(1, lora(adapter)), announce(2, None)]))
    assert list(side._reading) == [1, 2]
    late = [announce(3, lora(adapter)), announce(4, None)]
    write(adapter, b"two")
    vllm.load(lora(adapter, load_inplace=True))
    side.start_stores(KvringMetadata(stores=late))
    assert list(side._reading) == [1, 2, 4] and len(recorder.calls) == 3
    meta = side.take_worker_meta()
    assert meta.outcomes == {3: Outcome(ranks=1, chunks_failed=1, ranks_failed=1)}
    assert [one.salt for one in meta.adapters] == [NOT_KNOWN]
    assert side.take_worker_meta() is None


def test_an_adapter_that_ranks_have_loaded_with_different_contents_is_not_known(adapter, said) -> None:
    vllm = Vllm(ranks=2)
    for worker, content in zip(vllm.workers, (b"one", b"two")):
        write(adapter, content)
        worker.loaded(lora(adapter), *adapters._salt(lora(adapter), vllm.manager.lora_config))
    vllm.report()
    assert vllm.salt(lora(adapter)) == NOT_KNOWN and len(said) == 1


def test_only_so_many_adapters_are_remembered(adapter, monkeypatch, said) -> None:
    monkeypatch.setattr(adapters, "ADAPTERS_MAX", 3)
    vllm = Vllm()
    salts = [vllm.loaded(lora(adapter, lora_name=str(number), lora_int_id=1 + number)) for number in range(5)]
    assert [salt != NOT_KNOWN for salt in salts] == [True, True, True, False, False]
    assert len(said) == 1 and "3 LoRA adapters" in said[0]


def test_without_the_method_by_which_vllm_loads_adapters_none_is_known(adapter, monkeypatch, said) -> None:
    monkeypatch.delattr(WorkerLoRAManager, "_load_adapter")
    worker = LoadedAdapters()
    worker.watch()
    assert len(said) == 1 and "not kept" in said[0]
    assert not worker.holds(Adapters().of(lora(adapter))) and worker.holds(None)


def test_salted_keys_never_meet_others() -> None:
    key = bytes(range(32))
    assert salted(key, None) == key[:16]
    salt = b"\x01" + bytes(14) + b"\x80"
    assert salted(key, salt) == bytes([1]) + key[1:15] + bytes([15 ^ 0x80])
    assert salted(salted(key, salt), salt) == key[:16]
    assert joined(None, None) is None and joined(salt, None) == salt and joined(None, salt) == salt
    assert joined(salt, b"b" * 16) != joined(b"b" * 16, salt)
