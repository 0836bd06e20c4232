"""What decides the bytes of a page must be in the namespace or in the key."""

import os
from types import SimpleNamespace

import pytest
from harness import config as configs
from kvring.vllm.geometry import Geometry
from kvring.vllm.namespace import describe, fingerprint, lora_salt, weights_identity

SETUP = configs.Setup(connector="KvringConnector", connector_module="kvring.vllm")


def _fingerprint(change) -> bytes:
    engine = configs.engine(SETUP)
    change(engine.scheduler)
    geometry = Geometry.of(engine.scheduler, engine.scheduler_kv, 1)
    return fingerprint(describe(engine.scheduler, engine.scheduler_kv, geometry))


def _longrope(config, max_model_len: int) -> None:
    # As Phi-3's configuration has it: vLLM's Phi3LongRoPEScaledRotaryEmbedding takes the long factors for *all* positions
    # where --max-model-len is above the original one, and the short ones where it is not.
    config.model_config.hf_config.rope_scaling = {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16,
    }
    config.model_config.max_model_len = max_model_len


def test_long_and_short_rope_factors_are_two_namespaces() -> None:
    assert _fingerprint(lambda config: _longrope(config, 64)) != _fingerprint(lambda config: _longrope(config, 96))


def test_a_lora_that_is_overwritten_while_it_is_loaded_keeps_its_key(tmp_path) -> None:
    """vLLM loads an adapter once and keeps it (unless `load_inplace`): what it computes after the files were replaced is still
    the old content's KV. Under the new files' salt it is found by the next vLLM, which has loaded the new content."""
    adapter = tmp_path / "adapter_model.safetensors"
    adapter.write_bytes(b"one")
    lora = SimpleNamespace(lora_name="l", lora_int_id=1, lora_path=str(tmp_path), load_inplace=False)
    first = lora_salt(lora)
    adapter.write_bytes(b"two!")
    after_the_overwrite_in_the_same_vllm = lora_salt(lora)
    # Either the old salt, or one that no other process makes; never what a fresh process makes of the new files.
    in_a_fresh_vllm = lora_salt(SimpleNamespace(lora_name="l", lora_int_id=1, lora_path=str(tmp_path), load_inplace=False))
    assert after_the_overwrite_in_the_same_vllm != in_a_fresh_vllm, "KV of the old content is stored as the new content's"
    assert first is not None


def test_remote_weights_without_a_commit_are_not_all_the_same() -> None:
    """s3://…, a GGUF file in a repository, a model served by a streamer: what is at that address may change."""
    assert weights_identity("s3://bucket/model", None) != ["commit", None]


def test_sharded_weights_in_a_directory_below_count(tmp_path) -> None:
    """`model` may be a directory whose weights lie one level deeper (`original/`, `transformer/`, sharded_state)."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.safetensors").write_bytes(b"one")
    before = weights_identity(str(tmp_path), None)
    (tmp_path / "shards" / "a.safetensors").write_bytes(b"another")
    assert before != weights_identity(str(tmp_path), None)


@pytest.mark.parametrize(
    "name, change",
    {
        "kv_cache_dtype_skip_layers": lambda c: setattr(c.cache_config, "kv_cache_dtype_skip_layers", ["0"]),
        "hf_overrides": lambda c: c.model_config.hf_config.update({"rope_theta": 5000.0}),
        "quantization": lambda c: setattr(c.model_config, "quantization", "fp8"),
        "seed of dummy weights": lambda c: (setattr(c.load_config, "load_format", "dummy"), setattr(c.model_config, "seed", 7)),
        "draft model": lambda c: setattr(
            c, "speculative_config", SimpleNamespace(method="draft_model", model="draft-b", use_eagle=lambda: False)
        ),
    }.items(),
)
def test_it_is_another_namespace(name: str, change) -> None:
    def plain(config) -> None:
        if name == "seed of dummy weights":
            config.load_config.load_format = "dummy"
        if name == "draft model":
            config.speculative_config = SimpleNamespace(method="draft_model", model="draft-a", use_eagle=lambda: False)

    assert _fingerprint(plain) != _fingerprint(change)


def test_the_scheduler_and_a_worker_whose_model_has_changed_its_configuration_agree() -> None:
    """A worker's process has its own copy of the configuration, and models change it while they are built (vLLM pickles it at
    spawn). If the two fingerprints differ nothing is ever found, and nobody says so."""
    engine = configs.engine(SETUP)
    geometry = Geometry.of(engine.scheduler, engine.scheduler_kv, 1)
    scheduler = fingerprint(describe(engine.scheduler, engine.scheduler_kv, geometry))
    worker = engine.ranks[0]
    worker.model_config.hf_config.set_while_the_model_was_built = True
    assert fingerprint(describe(worker, engine.ranks_kv[0], geometry)) == scheduler
