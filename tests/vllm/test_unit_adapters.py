"""LoRA adapters: their content salts keys, and nobody waits for it."""

import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from kvring.vllm import adapters, identity
from kvring.vllm.adapters import NOT_KNOWN, Adapters, joined, salted


def lora(path: Any, **more: Any) -> Any:
    values = {"lora_name": "l", "lora_int_id": 1, "lora_path": str(path), "load_inplace": False, "is_3d_lora_weight": False}
    return SimpleNamespace(**values | more)


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    return tmp_path


def until(condition: Any) -> Any:
    for _ in range(2000):
        if found := condition():
            return found
        time.sleep(0.005)
    raise AssertionError("it does not come")


def known(salts: Adapters, request: Any) -> bytes:
    """The salt, once it is there."""
    return until(lambda: salts.salt(request))


def test_a_loras_content_is_part_of_the_key(adapter) -> None:
    assert Adapters().salt(None) is None
    first = known(Adapters(), lora(adapter))
    assert len(first) == 16 and first == known(Adapters(), lora(adapter))
    # After a restart: the same name, path, size and time of change.
    path = adapter / "adapter_model.safetensors"
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = known(Adapters(), lora(adapter))
    assert second != first
    (adapter / "adapter_config.json").write_text('{"lora_alpha": 2}')
    assert known(Adapters(), lora(adapter)) not in (first, second)
    assert known(Adapters(), lora(adapter, is_3d_lora_weight=True)) != known(Adapters(), lora(adapter))


def test_touched_files_and_others_beside_them_change_nothing(adapter) -> None:
    first = known(Adapters(), lora(adapter))
    os.utime(adapter / "adapter_model.safetensors", ns=(1, 1))
    (adapter / "training_args.bin").write_bytes(b"x")
    (adapter / "README.json").write_text("x")
    assert known(Adapters(), lora(adapter)) == first


def test_a_mount_that_hangs_does_not_hang_the_scheduler(adapter, monkeypatch) -> None:
    """The files are read by a thread of our own; until it comes back nothing is known, and no other adapter waits for it."""
    answers = threading.Event()
    threads = []
    read = identity.adapter

    def mount(folder: Any) -> str:
        threads.append(threading.current_thread())
        if folder.name == "hangs":
            answers.wait(30)
        return read(adapter)

    monkeypatch.setattr(identity, "adapter", mount)
    salts = Adapters(read_again_s=0.0)
    hanging = [lora("hangs", lora_int_id=number) for number in range(1, 4)]
    for _ in range(3):
        assert [salts.salt(one) for one in hanging] == [NOT_KNOWN] * 3
    assert known(salts, lora(adapter, lora_int_id=9))
    assert sum(thread.name == "kvring-adapter" for thread in threads) == len(threads)
    assert len({id(thread) for thread in threads if thread.is_alive()}) <= 4, (
        "one reads for each adapter, however often it is asked"
    )
    answers.set()
    assert known(salts, hanging[0])


def test_files_are_not_read_again_for_each_request(adapter, monkeypatch) -> None:
    reads = []
    read = identity.adapter
    monkeypatch.setattr(identity, "adapter", lambda folder: reads.append(folder) or read(folder))
    salts = Adapters()
    first = known(salts, lora(adapter))
    assert all(salts.salt(lora(adapter)) == first for _ in range(1000))
    assert len(reads) == 1
    assert known(salts, lora(adapter, lora_int_id=2)) == first, "loaded under another id it is read anew"
    assert len(reads) == 2


def test_an_adapter_that_is_changed_in_place_is_not_kept_any_more(adapter, monkeypatch) -> None:
    """vLLM goes on with the old content, or loads the new one, as its room allows."""
    said = []
    monkeypatch.setattr(adapters.logger, "warning", lambda *line: said.append(line))
    salts = Adapters(read_again_s=0.0)
    first = known(salts, lora(adapter))
    (adapter / "adapter_model.safetensors").write_bytes(b"two")
    until(lambda: salts.salt(lora(adapter)) == NOT_KNOWN)
    (adapter / "adapter_model.safetensors").write_bytes(b"one")
    assert {salts.salt(lora(adapter)) for _ in range(100)} == {NOT_KNOWN}
    assert len(said) == 1
    assert known(salts, lora(adapter, lora_int_id=2)) == first, "loaded again it is what its files hold"


def test_an_adapter_whose_files_are_gone_is_what_was_loaded(adapter) -> None:
    """Fetched into a temporary folder, loaded, removed."""
    salts = Adapters(read_again_s=0.0)
    first = known(salts, lora(adapter))
    for path in adapter.iterdir():
        path.unlink()
    for _ in range(20):
        assert salts.salt(lora(adapter)) == first
        time.sleep(0.002)


def test_one_that_is_loaded_at_each_step_is_never_known(adapter) -> None:
    salts = Adapters()
    known(salts, lora(adapter))
    assert salts.salt(lora(adapter, load_inplace=True)) == NOT_KNOWN


def test_a_lora_from_a_hub_is_known_to_one_process() -> None:
    salts = Adapters()
    here = known(salts, lora("org/lora"))
    assert here == known(salts, lora("org/lora")) != known(Adapters(), lora("org/lora"))
    assert here != known(salts, lora("org/lora", lora_int_id=2)), "another load may be of another commit"


def test_salted_keys_never_meet_others() -> None:
    key = bytes(range(32))
    assert salted(key, None) == key[:16]
    salt = b"\x01" + bytes(14) + b"\x80"
    assert salted(key, salt) == bytes([1]) + key[1:15] + bytes([15 ^ 0x80])
    assert salted(salted(key, salt), salt) == key[:16]
    assert joined(None, None) is None and joined(salt, None) == salt and joined(None, salt) == salt
    assert joined(salt, b"b" * 16) != joined(b"b" * 16, salt)
