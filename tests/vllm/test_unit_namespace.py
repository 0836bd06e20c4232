"""Who may share KV with whom: content, or the instance; never a time, never a guess."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness import config as configs

from kvring.vllm import namespace
from kvring.vllm.geometry import Geometry
from kvring.vllm.namespace import describe, fingerprint

SETUP = configs.Setup(connector="KvringConnector", connector_module="kvring.vllm")


def described(change: Any = lambda config: None, *, worker: bool = False, version: str | None = None) -> dict[str, Any]:
    """The namespace of a vLLM of its own, of which `change` has changed something."""
    engine = configs.engine(SETUP)
    config, cache = (engine.ranks[0], engine.ranks_kv[0]) if worker else (engine.scheduler, engine.scheduler_kv)
    change(config)
    return describe(config, cache, Geometry.of(config, cache, 1), version)


def named(change: Any = lambda config: None, **more: Any) -> bytes:
    return fingerprint(described(change, **more))


@pytest.fixture
def model(tmp_path) -> Path:
    """A model's folder, as a mount that anything may be put into."""
    folder = tmp_path / "model"
    shutil.copytree(configs._model_dir(), folder)
    return folder


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The warnings."""
    lines: list[str] = []
    monkeypatch.setattr(namespace.logger, "warning", lines.append)
    return lines


def at(folder: Path, **more: Any) -> Any:
    """A vLLM that serves the model of this folder. `load_format="dummy"`, or any other thing of the loader's or the model's."""

    def change(config: Any) -> None:
        config.model_config.model = str(folder)
        for name, value in more.items():
            setattr(config.load_config if hasattr(config.load_config, name) else config.model_config, name, value)

    return change


def is_private(change: Any) -> bool:
    """Is it a name that no other vLLM has, and all processes of this one?"""
    config = configs.engine(SETUP)
    other = configs.engine(SETUP)
    for one in (config, other):
        change(one.scheduler)
    worker = copy.deepcopy(config.scheduler)
    geometry = Geometry.of(config.scheduler, config.scheduler_kv, 1)
    ours, workers, others = (
        describe(one, cache, geometry)
        for one, cache in (
            (config.scheduler, config.scheduler_kv),
            (worker, config.ranks_kv[0]),
            (other.scheduler, other.scheduler_kv),
        )
    )
    assert ours == workers, "a vLLM's own processes disagree"
    return ours != others


def rope(folder: Path, **parameters: Any) -> Any:
    """A model with another rotary embedding."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": parameters}))
    return at(folder)


def both(*changes: Any) -> Any:
    def change(config: Any) -> None:
        for one in changes:
            one(config)

    return change


def longer(config: Any) -> None:
    config.model_config.original_max_model_len = config.model_config.max_model_len = config.model_config.max_model_len * 2


def fitted(config: Any) -> None:
    """`--max-model-len auto`: what fits into the memory that there is today."""
    config.model_config.original_max_model_len, config.model_config.max_model_len = -1, os.getpid()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: setattr(c.cache_config, "kv_cache_dtype_skip_layers", ["0"]),
        lambda c: setattr(c.model_config, "hf_overrides", {"rope_theta": 5000.0}),
        lambda c: setattr(c.model_config, "quantization", "fp8"),
        lambda c: setattr(c.model_config, "quantization_config", {"linear": "mxfp8"}),
        lambda c: setattr(c.model_config, "model_impl", "transformers"),
        lambda c: setattr(c.load_config, "load_format", "dummy"),
        lambda c: setattr(c.load_config, "model_loader_extra_config", {"distributed": True}),
        lambda c: setattr(c.load_config, "ignore_patterns", ["*.safetensors"]),
        lambda c: setattr(c.cache_config, "prefix_caching_hash_algo", "xxhash"),
        lambda c: setattr(c.cache_config, "cache_dtype", "nvfp4_4over6"),
        lambda c: setattr(c.cache_config, "cache_dtype", "fp8_e5m2"),
        lambda c: setattr(c.attention_config, "use_prefill_query_quantization", True),
        lambda c: setattr(c.attention_config, "disable_flashinfer_q_quantization", True),
        lambda c: setattr(c.attention_config, "flash_attn_version", 3),
        lambda c: setattr(c.attention_config, "sparse_mla_force_mqa", True),
        lambda c: setattr(c.kernel_config, "moe_backend", "marlin"),
        lambda c: setattr(c.kernel_config, "linear_backend", "cutlass"),
        lambda c: setattr(c, "lora_config", object()),
    ],
)
def test_it_is_another_namespace(change: Any) -> None:
    assert named() == named() != named(change)


def test_the_scheduler_and_a_worker_whose_model_has_changed_its_configuration_agree() -> None:
    """Models change it while they are built, in the worker's process: were the two different nothing would ever be found."""

    def built(config: Any) -> None:
        config.model_config.hf_config.set_while_the_model_was_built = True

    assert named(built, worker=True) == named()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("VLLM_BATCH_INVARIANT", "1"),
        ("VLLM_MARLIN_INPUT_DTYPE", "int8"),
        ("VLLM_CPU_INT4_W4A8", "1"),
        ("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "uniform_random"),
        # Which layers a rank has, and so how large its part of a chunk is: another one could not even be registered.
        ("VLLM_PP_LAYER_PARTITION", "15,17"),
        ("VLLM_FLOAT32_MATMUL_PRECISION", "medium"),
        ("VLLM_USE_DEEP_GEMM", "0"),
        ("VLLM_ROCM_USE_SKINNY_GEMM", "0"),
    ],
)
def test_what_is_computed_follows_from_environment_variables_too(variable, value, monkeypatch) -> None:
    monkeypatch.delenv(variable, raising=False)
    before = named()
    monkeypatch.setenv(variable, value)
    assert named() == named() == named(worker=True) != before


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("VLLM_PORT", "1234"),
        ("VLLM_HOST_IP", "10.0.0.1"),
        ("VLLM_DP_RANK", "1"),
        ("VLLM_LOGGING_LEVEL", "DEBUG"),
        ("VLLM_CACHE_ROOT", "/tmp/cache"),
        ("VLLM_NIXL_SIDE_CHANNEL_PORT", "5600"),
        ("VLLM_RPC_TIMEOUT", "1"),
        ("VLLM_ENGINE_READY_TIMEOUT_S", "1"),
        ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1"),
        ("VLLM_CPU_OMP_THREADS_BIND", "0-1"),
        ("VLLM_LORA_RESOLVER_CACHE_DIR", "/tmp/loras"),
        ("VLLM_OF_SOMEBODY_ELSE", "1"),
        ("CUDA_VISIBLE_DEVICES", "1"),
    ],
)
def test_equal_deployments_may_have_other_environment_variables(variable, value, monkeypatch) -> None:
    monkeypatch.delenv(variable, raising=False)
    before = named()
    monkeypatch.setenv(variable, value)
    assert named() == before


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("VLLM_MLA_DISABLE", "1"),
        ("VLLM_ALLREDUCE_USE_SYMM_MEM", "0"),
        ("VLLM_USE_AOT_COMPILE", "0"),
        ("VLLM_ROCM_USE_SKINNY_GEMM", "0"),
    ],
)
def test_what_vllm_sets_in_its_workers_only_is_not_in_it(variable, value, monkeypatch) -> None:
    """`override_envs_for_invariance`, and a model that is built without MLA: the scheduler's process has it as it was."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.delenv(variable, raising=False)
    before = named()
    monkeypatch.setenv(variable, value)
    assert named(worker=True) == before


def test_a_model_that_sets_options_of_attention_while_it_is_built_has_one_name() -> None:
    def theirs(config: Any) -> None:
        config.model_config.model_arch_config.architectures = ["HYV4ForCausalLM"]

    assert named(theirs) == named(both(theirs, lambda c: setattr(c.attention_config, "sparse_mla_force_mqa", True)), worker=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: setattr(c.kernel_config, "enable_jit_warmup", not c.kernel_config.enable_jit_warmup),
        lambda c: setattr(c.kernel_config, "enable_cutedsl_warmup", not c.kernel_config.enable_cutedsl_warmup),
        lambda c: setattr(c.attention_config, "sparse_mla_prefill_workspace_factor", 2),
    ],
)
def test_what_is_warmed_up_and_how_much_room_there_is_is_not_in_it(change) -> None:
    """vLLM sets these by --enforce-eager and by the longest context, for every model."""
    assert named(change) == named()


def test_the_versions_of_plugins_and_packages_are_in_it(monkeypatch) -> None:
    """A plugin may put code of its own in the place of vLLM's."""
    from importlib import metadata
    from types import SimpleNamespace

    before = named()
    plugins = {"vllm.general_plugins": [], "vllm.platform_plugins": []}
    found = metadata.entry_points
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: [*found(group=group), *plugins[group]])

    def plugin(module: str, version: str) -> Any:
        return SimpleNamespace(name=module, value=module, module=module, dist=SimpleNamespace(name=module, version=version))

    for group in plugins:
        names = set()
        for version in ("1", "2"):
            plugins[group] = [plugin("theirs.plugin", version)]
            assert named() == named(worker=True)
            names.add(named())
        assert len(names | {before}) == 3
        plugins[group] = [plugin("kvring.plugin", "9")]
        assert named() == before
        plugins[group] = []
    plugins["vllm.general_plugins"] = [plugin("theirs", "1")]
    monkeypatch.setenv("VLLM_PLUGINS", "kvring")
    assert named() == before, "it is not loaded"
    monkeypatch.undo()
    version = metadata.version
    for package in ("torchao", "bitsandbytes", "compressed-tensors", "mistral_common", "transformers", "flashinfer-python"):
        with monkeypatch.context() as patch:
            patch.setattr(metadata, "version", lambda name, other=package: "0.0.1" if name == other else version(name))
            assert named() != before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"load_format": "safetensors"}, {"load_format": "fastsafetensors"}),
        ({"load_format": "safetensors"}, {"load_format": "instanttensor"}),
        ({}, {"model_loader_extra_config": {"enable_multithread_load": True, "num_threads": 8}}),
        ({"load_format": "runai_streamer"}, {"load_format": "runai_streamer", "model_loader_extra_config": {"concurrency": 4}}),
    ],
)
def test_how_fast_the_same_files_are_read_is_not_in_it(model, one, other) -> None:
    assert named(at(model, **one)) == named(at(model, **other))


def groups_of(*specs: Any, first_only: bool) -> Any:
    """A group of several kinds of layers, as a worker has it, or as the scheduler's side does."""
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    def change(cache: Any) -> None:
        named = {f"layer.{index}": spec for index, spec in enumerate(specs)}
        (group,) = cache.kv_cache_groups
        group.kv_cache_spec = (
            specs[0] if first_only else UniformTypeKVCacheSpecs(block_size=specs[0].block_size, kv_cache_specs=named)
        )

    return change


def test_a_group_of_several_kinds_of_layers_has_one_name_on_both_sides() -> None:
    """Full attention beside an indexer's cache: a worker is told all layers, the scheduler's side the first of them."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    more = {"block_size": 16, "num_kv_heads": 1, "head_size": 64, "dtype": torch.float16}
    specs = MLAAttentionSpec(**more), FullAttentionSpec(**more)

    def name(first_only: bool, specs: Any = specs) -> bytes:
        engine = configs.engine(SETUP)
        config, cache = (engine.scheduler, engine.scheduler_kv) if first_only else (engine.ranks[0], engine.ranks_kv[0])
        groups_of(*specs, first_only=first_only)(cache)
        return fingerprint(describe(config, cache, Geometry.of(config, cache, 1)))

    assert name(True) == name(False)
    # As large as the pages are: another size is another shape of what is stored.
    wider = tuple(type(spec)(**more | {"head_size": 128}) for spec in specs)
    assert name(True, wider) != name(True)


def test_a_description_is_plain_values() -> None:
    """An address, or the order of a set, would be another one in each process."""

    def change(config: Any) -> None:
        from vllm.config.quantization import resolve_quantization_config

        config.model_config.hf_overrides = lambda given: given
        config.model_config.quantization = "fp8_per_tensor"
        config.model_config.quantization_config = resolve_quantization_config("fp8_per_tensor", None)
        multimodal()(config)

    text = json.dumps(described(change))
    assert " at 0x" not in text


# Weights, and the files beside them.


def test_other_weights_of_the_same_name_size_and_time_are_others(model) -> None:
    """A mount at a fixed path (KServe), images with normalised times, `rsync -t`."""
    weights = model / "model.safetensors"
    stat = weights.stat()
    before = named(at(model))
    weights.write_bytes(b"some"[: stat.st_size])
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights.stat().st_size == stat.st_size and weights.stat().st_mtime_ns == stat.st_mtime_ns
    assert named(at(model)) != before


def test_the_same_weights_elsewhere_or_touched_are_the_same(model, tmp_path) -> None:
    before = named(at(model))
    shutil.copytree(model, tmp_path / "copy")
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert named(at(model)) == before == named(at(tmp_path / "copy"))


@pytest.mark.parametrize("name", ["notes.json", "README.md", "tokenizer_config.json", "generation_config.json", "optimizer.pt"])
def test_what_changes_no_kv_is_not_in_it(model, name) -> None:
    before = named(at(model))
    (model / name).write_text("{}")
    assert named(at(model)) == before


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "quantize_config.json", "params.json", "model.safetensors.index.json",
             "whisper/model.safetensors", "joint.pt"]
)  # fmt: skip
def test_files_that_decide_are_in_it(model, name) -> None:
    before = named(at(model))
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text('{"another": 1}')
    assert named(at(model)) != before


def test_code_counts_where_it_is_run(model, tmp_path) -> None:
    before = named(at(model)), named(at(model, trust_remote_code=True))
    (model / "modeling.py").write_text("theirs = 1")
    assert named(at(model)) == before[0]
    assert named(at(model, trust_remote_code=True)) != before[1]
    # From another repository, which a folder stands for here.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "processing.py").write_text("one = 1")
    (model / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": f"{elsewhere}--processing.P"}}))
    one = named(at(model, trust_remote_code=True))
    (elsewhere / "processing.py").write_text("two = 2")
    assert named(at(model, trust_remote_code=True)) != one
    (model / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": ["org/none--processing.P"]}}))
    assert is_private(at(model, trust_remote_code=True)) and not is_private(at(model))


def test_a_configuration_of_another_place_counts(model, tmp_path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "config.json").write_text("{}")
    before = named(at(model, hf_config_path=str(there)))
    (there / "config.json").write_text('{"rope_theta": 1}')
    assert named(at(model, hf_config_path=str(there))) != before
    (there / "quantization.json").write_text("{}")
    overrides = {"quantization_config_file": str(there / "quantization.json")}
    before = named(at(model, hf_overrides=overrides))
    (there / "quantization.json").write_text('{"bits": 4}')
    assert named(at(model, hf_overrides=overrides)) != before


def test_shards_that_are_found_by_a_pattern_count(model, tmp_path) -> None:
    """`--load-format sharded_state` with a pattern that leads elsewhere."""
    (tmp_path / "shards").mkdir()
    shard = tmp_path / "shards" / "rank-0-part-0.weights"
    shard.write_bytes(b"one")
    change = at(
        model, load_format="sharded_state", model_loader_extra_config={"pattern": "../shards/rank-{rank}-part-{part}.weights"}
    )
    before = named(change)
    shard.write_bytes(b"two")
    assert named(change) != before
    assert is_private(at(model, load_format="sharded_state", model_loader_extra_config={"pattern": "{"}))


def test_numpy_copies_of_weights_are_what_is_loaded(model) -> None:
    (model / "np").mkdir()
    (model / "np" / "lm_head.weight").write_bytes(b"one")
    before = named(at(model)), named(at(model, load_format="npcache"))
    (model / "np" / "lm_head.weight").write_bytes(b"two")
    assert named(at(model)) == before[0] and named(at(model, load_format="npcache")) != before[1]


@pytest.mark.parametrize(
    "more",
    [
        {"load_format": "tensorizer"},
        {"load_format": "modelexpress"},
        {"load_format": "ipc_cache"},
        {"load_format": "of_a_plugin"},
        {"model_weights": "s3://bucket/model"},
    ],
)
def test_weights_that_no_file_tells_are_this_vllms_alone(model, more, said) -> None:
    assert is_private(at(model, **more)) and not is_private(at(model))
    assert said and all("kvring.weights_version" in line for line in said)
    # What only the user knows.
    assert named(at(model, **more), version="1") == named(at(model, **more), version="1") != named(at(model, **more), version="2")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "quantize_config.json", "modeling.py"])
def test_a_version_of_the_weights_stands_for_their_files_only(model, tmp_path, name) -> None:
    """Not for a configuration, or for code: two folders of one version may have others."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(model, elsewhere)
    names = []
    for text in ("1", "2"):
        (model / name).write_text(f'{{"rope_theta": {text}}}')
        names.append(named(at(model, load_format="tensorizer", trust_remote_code=True), version="1"))
    assert names[0] != names[1]
    theirs = [named(at(folder, load_format="tensorizer"), version="1") for folder in (elsewhere, tmp_path / "model")]
    assert theirs[0] != theirs[1], "a version of one model's is no version of another one's"


@pytest.mark.parametrize(
    "more",
    [
        {"load_format": "dummy"},
        {"load_format": "dummy", "quantization": "gptq"},
        {"hf_overrides": lambda config: config},
        {"model": "s3://bucket/model"},
        {"model": "org/never-fetched"},
        {"hf_config_path": "org/never-fetched"},
    ],
)
def test_what_a_version_of_the_weights_does_not_tell_is_this_vllms_alone(model, more, said) -> None:
    assert is_private(at(model, **more)) and len(said) == 3
    assert named(at(model, **more), version="1") != named(at(model, **more), version="1")


def test_weights_that_are_pushed_into_it_are_this_vllms_alone(model, said) -> None:
    pushed = both(at(model), lambda config: setattr(config, "weight_transfer_config", object()))
    assert is_private(pushed) and all("weight_transfer_config" in line for line in said)
    assert named(pushed, version="1") != named(pushed, version="1")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["written", "replaced by a link to another one"])
def test_files_that_change_while_vllm_starts_tell_nothing(model, said, name, how) -> None:
    """It may have loaded what was there before. A time is reason to doubt, and never to believe."""
    changed = (model / name).stat().st_ctime_ns
    if how != "written":
        (model / name).rename(model / "other")
        there = max(file.stat().st_ctime_ns for file in model.iterdir())
        while changed < there + 5_000_000:
            (model / name).unlink(missing_ok=True)
            (model / name).symlink_to(model / "other")
            changed = (model / name).lstat().st_ctime_ns

    def started(when: int) -> Any:
        return both(at(model), lambda config: setattr(config, "instance_id", str(when)))

    latest = max(file.lstat().st_ctime_ns for file in model.iterdir())
    assert not is_private(started(latest + 1_000_000)) and not said
    assert is_private(started(changed - 1_000_000)) and said
    assert named(started(changed - 1_000_000), version="1") != named(started(changed - 1_000_000), version="1")


def test_a_folder_without_weights_tells_none(model) -> None:
    (model / "model.safetensors").unlink()
    assert is_private(at(model))


@pytest.mark.parametrize(
    "text",
    ['{"a":' + "[" * 200_000 + "]" * 200_000 + "}", '{"rope_scaling": ' + '{"a":' * 50_000 + "1" + "}" * 50_000 + "}"],
)
def test_a_configuration_that_cannot_be_read_ends_nothing(model, text) -> None:
    (model / "config.json").write_text(text)
    assert is_private(at(model))


@pytest.mark.parametrize("overrides", [{1: "a", "1": [1]}, {"a": object()}])
def test_what_has_no_words_is_this_vllms_alone(overrides, said) -> None:
    """Such as an object that is told by its address: another one in each process."""
    private = is_private(lambda config: setattr(config.model_config, "hf_overrides", overrides))
    assert private and said


@pytest.mark.parametrize("error", [OverflowError(), MemoryError(), RecursionError(), ImportError("no such name")])
def test_whatever_goes_wrong_while_files_are_looked_at_ends_nothing(model, monkeypatch, said, error) -> None:

    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(namespace.identity.content, "digest", fails)
    assert is_private(at(model))
    assert said and all(type(error).__name__ in line or str(error) in line for line in said)


def test_too_many_files_and_configurations_that_are_too_large_are_not_read(model, monkeypatch) -> None:
    monkeypatch.setattr(namespace.identity.content, "FILES_MAX", 50)
    assert not is_private(at(model))
    for number in range(60):
        (model / f"{number}.bin").touch()
    assert is_private(at(model))
    monkeypatch.undo()
    assert not is_private(at(model))
    (model / "config.json").touch()
    os.truncate(model / "config.json", namespace.identity.content.READ_WHOLE_MAX + 1)
    assert is_private(at(model))


def test_a_version_of_the_weights_adds_to_what_is_known(model) -> None:
    assert len({named(at(model), version=version) for version in (None, "1", "2")}) == 3


def test_a_model_from_a_hub_is_its_files_in_the_cache(model, tmp_path, monkeypatch) -> None:
    """Whichever commit they came with; also where vLLM has not fetched all of the repository."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--name"

    def fetched(commit: str, weights: str) -> None:
        snapshot = repository / "snapshots" / commit
        for folder in (snapshot, repository / "blobs", repository / "refs", repository / "trees"):
            folder.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        (repository / "blobs" / weights).touch()
        shutil.copy(model / "config.json", snapshot)
        (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / weights)

    from huggingface_hub import _snapshot_download as hub

    hub_download = hub.snapshot_download
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *args, **kw: hub_download(*args, **{**kw, "cache_dir": cache})
    )
    fetched("a" * 40, "1" * 64)
    change = at(Path("org/name"))
    first = described(change)
    assert first["weights"][0] == "content"
    fetched("b" * 40, "1" * 64)
    assert described(change) == first
    fetched("c" * 40, "2" * 64)
    assert described(change) != first


# What a longest context has to do with it.


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_where_positions_turn_the_same_at_any_length_the_longest_context_is_not_in_it(model, kind) -> None:
    change = rope(model, rope_type=kind, factor=2.0)
    assert named(change) == named(both(change, longer)) == named(both(change, fitted))

    def built(config: Any) -> None:
        config.model_config.hf_config.rope_parameters = {"rope_type": "what a model has made of it while it was built"}

    assert named(both(change, built), worker=True) == named(change)


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "some_new_one"])
def test_where_all_positions_turn_by_the_longest_context_it_is_in_it(model, kind) -> None:
    """Phi-3's long rope takes its short or its long factors, for all positions, by this one."""
    change = rope(model, type=kind, factor=2.0)
    assert named(change) != named(both(change, longer))
    # What vLLM finds itself it has found when the model was built, before it looked at the memory.
    assert named(both(change, fitted)) == named(both(change, fitted, lambda c: setattr(c.model_config, "max_model_len", 64)))
    nested = rope(model, full_attention={"rope_type": kind}, sliding_attention={"rope_type": "default"})
    assert named(nested) != named(both(nested, longer))


@pytest.mark.parametrize("what", ["phi3", "theirs", "overridden", "nothing"])
def test_where_the_rotary_embedding_is_not_told_for_certain_the_longest_context_is_in_it(model, what) -> None:
    def change(config: Any) -> None:
        at(model)(config)
        if what == "phi3":
            config.model_config.hf_config.model_type = "phi3"
        elif what == "theirs":
            theirs = type(
                "TheirConfig", (type(config.model_config.hf_config),), {"__module__": "transformers_modules.org.config"}
            )
            config.model_config.hf_config.__class__ = theirs
        elif what == "overridden":
            config.model_config.hf_overrides = {"text_config": {"rope_parameters": {"rope_type": "longrope"}}}

    if what == "nothing":
        (model / "config.json").unlink()
    assert named(change) == named(change) != named(both(change, longer))


def test_llama_4_tunes_its_temperature_by_the_longest_context(model) -> None:
    def llama4(config: Any) -> None:
        config.model_config.hf_config.model_type = "llama4_text"

    here = both(at(model), llama4)
    before = named(here)
    assert named(both(here, longer)) != before
    assert named(both(here, lambda c: setattr(c.model_config, "override_generation_config", {"x": 1}))) != before
    (model / "generation_config.json").write_text('{"attn_temperature_tuning": false}')
    assert named(here) != before


# Images, sound, video.


def multimodal(prefix_caching: bool = True, **more: Any) -> Any:
    def change(config: Any) -> None:
        from vllm.config.multimodal import MultiModalConfig

        config.model_config.multimodal_config = MultiModalConfig(**more)
        config.cache_config.enable_prefix_caching = prefix_caching

    return change


@pytest.mark.parametrize(
    "more",
    [
        {"mm_processor_kwargs": {"do_normalize": False}},
        {"media_io_kwargs": {"video": {"num_frames": 40}}},
        {"mm_device_do_normalize": False},
        {"video_pruning_rate": 0.5},
        {"mm_encoder_tp_mode": "data"},
    ],
)
def test_how_images_are_prepared_is_in_it(more) -> None:
    assert named(multimodal()) == named(multimodal()) != named(multimodal(**more))


def test_images_that_are_counted_are_this_vllms_alone(said) -> None:
    """With neither cache vLLM's ids of images are a counter of the process: another image has the same one after a restart."""
    counted = multimodal(prefix_caching=False, mm_processor_cache_gb=0)
    assert not is_private(multimodal(prefix_caching=False)) and not is_private(multimodal(mm_processor_cache_gb=0))
    assert not said
    assert is_private(counted)
    assert said and all("--mm-processor-cache-gb" in line for line in said)
    # A version of the weights says nothing of images.
    assert named(counted, version="1") != named(counted, version="1")


def test_scales_of_an_image_encoder_are_their_file_or_this_vllms_own(tmp_path) -> None:
    scales = tmp_path / "scales.json"
    scales.write_text("1")
    change = multimodal(mm_encoder_attn_dtype="fp8", mm_encoder_fp8_scale_path=str(scales))
    before = named(change)
    scales.write_text("2")
    assert named(change) != before and not is_private(change)
    # Gone, or not readable any more.
    assert is_private(both(lambda _: scales.write_text("2"), change, lambda _: scales.unlink()))
    assert is_private(multimodal(mm_encoder_attn_dtype="fp8"))


# Keys.


@pytest.mark.parametrize("algorithm", ["xxhash", "xxhash_cbor"])
def test_keys_that_begin_anew_in_each_process_are_warned_of(algorithm, said, monkeypatch) -> None:

    def change(config: Any) -> None:
        config.cache_config.prefix_caching_hash_algo = algorithm

    monkeypatch.setenv("PYTHONHASHSEED", "0")
    described(change)
    assert not said
    monkeypatch.delenv("PYTHONHASHSEED")
    described()
    assert not said
    described(change)
    assert len(said) == 1 and "PYTHONHASHSEED" in said[0]


def test_any_difference_is_another_fingerprint() -> None:
    one = {"model": "a", "tensor_parallel": 1}
    assert len(fingerprint(one)) == 32
    assert fingerprint(one) == fingerprint(dict(reversed(one.items())))
    assert len({fingerprint(one), fingerprint(one | {"tensor_parallel": 2}), fingerprint(one | {"more": None})}) == 3
