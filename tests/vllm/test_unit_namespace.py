"""Who may share KV with whom."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
from harness import config as configs

from kvring.vllm.geometry import Geometry
from kvring.vllm.namespace import LoraSalts, describe, fingerprint, joined, salted, weights_identity

SETUP = configs.Setup(connector="KvringConnector", connector_module="kvring.vllm")


def _fingerprint(change: Any = lambda config: None, *, worker: bool = False) -> bytes:
    engine = configs.engine(SETUP)
    config, cache = (engine.ranks[0], engine.ranks_kv[0]) if worker else (engine.scheduler, engine.scheduler_kv)
    change(config)
    return fingerprint(describe(config, cache, Geometry.of(config, cache, 1)))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: setattr(c.cache_config, "kv_cache_dtype_skip_layers", ["0"]),
        lambda c: setattr(c.model_config, "hf_overrides", {"rope_theta": 5000.0}),
        lambda c: setattr(c.model_config, "quantization", "fp8"),
        # Phi-3's long rope takes its short or its long factors, for all positions, by this one.
        lambda c: setattr(c.model_config, "max_model_len", c.model_config.max_model_len * 2),
        lambda c: (setattr(c.load_config, "load_format", "dummy"), setattr(c.model_config, "seed", 7)),
        lambda c: setattr(c.cache_config, "prefix_caching_hash_algo", "xxhash"),
    ],
)
def test_it_is_another_namespace(change: Any) -> None:
    assert _fingerprint() != _fingerprint(change)


def test_the_scheduler_and_a_worker_whose_model_has_changed_its_configuration_agree() -> None:
    """Models change it while they are built, in the worker's process: were the two different nothing would ever be found."""

    def built(config: Any) -> None:
        config.model_config.hf_config.set_while_the_model_was_built = True

    assert _fingerprint(built, worker=True) == _fingerprint()


def test_weights_that_are_replaced_in_place_are_others(tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.safetensors").write_bytes(b"one")
    (tmp_path / "notes.txt").write_text("does not matter")
    before = weights_identity(str(tmp_path), None, "i")
    assert before == weights_identity(str(tmp_path), "commit", "j"), "local files decide"
    (tmp_path / "notes.txt").write_text("really not")
    assert before == weights_identity(str(tmp_path), None, "i")
    (tmp_path / "shards" / "a.safetensors").write_bytes(b"another")
    below = weights_identity(str(tmp_path), None, "i")
    assert below != before
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert below != weights_identity(str(tmp_path), None, "i")


def test_weights_from_a_hub_are_their_commit_and_others_are_nobody_elses() -> None:
    assert weights_identity("org/model", "abc", "i") == ["commit", "abc"]
    assert weights_identity("s3://bucket/model", None, "i") != weights_identity("s3://bucket/model", None, "j")


def test_any_difference_is_another_fingerprint() -> None:
    one = {"model": "a", "tensor_parallel": 1}
    assert len(fingerprint(one)) == 32
    assert fingerprint(one) == fingerprint(dict(reversed(one.items())))
    assert len({fingerprint(one), fingerprint(one | {"tensor_parallel": 2}), fingerprint(one | {"more": None})}) == 3


def _lora(path: Any, **more: Any) -> Any:
    return SimpleNamespace(**{"lora_name": "l", "lora_int_id": 1, "lora_path": str(path), "load_inplace": False} | more)


def test_a_loras_content_is_part_of_the_key(tmp_path) -> None:
    adapter = tmp_path / "adapter_model.safetensors"
    adapter.write_bytes(b"one")
    salts = LoraSalts()
    first = salts.of(_lora(tmp_path))
    assert salts.of(None) is None and first == salts.of(_lora(tmp_path)) == LoraSalts().of(_lora(tmp_path))
    adapter.write_bytes(b"two!")
    fresh = LoraSalts().of(_lora(tmp_path))
    assert fresh not in (first, None)
    # This vLLM may still have the old content: what it computes is nobody's, each time anew.
    assert len({first, fresh, salts.of(_lora(tmp_path)), salts.of(_lora(tmp_path))}) == 4
    assert salts.of(_lora(tmp_path, lora_int_id=2)) == fresh, "loaded under another id it is the new content for certain"
    assert LoraSalts().of(_lora(tmp_path, load_inplace=True)) not in (first, fresh)


def test_a_lora_from_a_hub_is_known_to_one_process() -> None:
    salts = LoraSalts()
    assert salts.of(_lora("org/lora")) == salts.of(_lora("org/lora")) != LoraSalts().of(_lora("org/lora"))


def test_salted_keys_never_meet_others() -> None:
    key = bytes(range(32))
    assert salted(key, None) == key[:16]
    salt = b"\x01" + bytes(14) + b"\x80"
    assert salted(key, salt) == bytes([1]) + key[1:15] + bytes([15 ^ 0x80])
    assert salted(salted(key, salt), salt) == key[:16]
    assert joined(None, None) is None and joined(salt, None) == salt and joined(None, salt) == salt
    assert joined(salt, b"b" * 16) != joined(b"b" * 16, salt)
