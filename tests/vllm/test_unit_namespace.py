"""Who may share KV with whom."""

import os
from types import SimpleNamespace

from kvring.vllm.namespace import fingerprint, joined, lora_salt, salted, weights_identity


def test_weights_that_are_replaced_in_place_are_others(tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    (tmp_path / "notes.txt").write_text("does not matter")
    before = weights_identity(str(tmp_path), None)
    assert before == weights_identity(str(tmp_path), "commit"), "local files decide"
    (tmp_path / "notes.txt").write_text("really not")
    assert before == weights_identity(str(tmp_path), None)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert before != weights_identity(str(tmp_path), None)


def test_weights_from_a_hub_are_their_commit() -> None:
    assert weights_identity("org/model", "abc") == ["commit", "abc"]


def test_any_difference_is_another_namespace() -> None:
    one = {"model": "a", "tensor_parallel": 1}
    assert len(fingerprint(one)) == 32
    assert fingerprint(one) == fingerprint(dict(reversed(one.items())))
    assert len({fingerprint(one), fingerprint(one | {"tensor_parallel": 2}), fingerprint(one | {"more": None})}) == 3


def test_a_loras_content_is_part_of_the_key(tmp_path) -> None:
    adapter = tmp_path / "adapter_model.safetensors"
    adapter.write_bytes(b"one")
    lora = SimpleNamespace(lora_name="l", lora_path=str(tmp_path))
    first = lora_salt(lora)
    assert lora_salt(None) is None and first == lora_salt(lora)
    adapter.write_bytes(b"two!")
    assert lora_salt(lora) not in (first, None)
    assert lora_salt(SimpleNamespace(lora_name="m", lora_path="")) is not None


def test_salted_keys_never_meet_others() -> None:
    key = bytes(range(32))
    assert salted(key, None) == key[:16]
    salt = b"\x01" + bytes(14) + b"\x80"
    assert salted(key, salt) == bytes([1]) + key[1:15] + bytes([15 ^ 0x80])
    assert salted(salted(key, salt), salt) == key[:16]
    assert joined(None, None) is None and joined(salt, None) == salt and joined(None, salt) == salt
    assert joined(salt, b"b" * 16) != joined(b"b" * 16, salt)
