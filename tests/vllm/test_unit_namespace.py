"""vLLMs share KV if they compute from the same content. Where that is not known for certain the namespace is one vLLM's own."""

import copy
import importlib.metadata
import json
import os
import shutil
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import config as configs
from vllm.config.multimodal import MultiModalConfig
from vllm.config.quantization import resolve_quantization_config
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, UniformTypeKVCacheSpecs

from kvring.vllm import namespace
from kvring.vllm.geometry import Geometry
from kvring.vllm.namespace import describe, fingerprint

SETUP = configs.Setup(connector="KvringConnector", connector_module="kvring.vllm")


def described(*changes: Any, worker: bool = False, version: str | None = None) -> dict[str, Any]:
    """The namespace of a vLLM of its own after these changes of its configuration: as its scheduler's side describes it, or as a
    worker does."""
    engine = configs.engine(SETUP)
    config, cache = (engine.ranks[0], engine.ranks_kv[0]) if worker else (engine.scheduler, engine.scheduler_kv)
    for change in changes:
        change(config)
    return describe(config, cache, Geometry.of(config, cache, 1), version)


def named(*changes: Any, **more: Any) -> bytes:
    return fingerprint(described(*changes, **more))


def is_private(*changes: Any) -> bool:
    """Is the namespace this vLLM's own? All of its processes have the same one in any case."""
    engine, other = configs.engine(SETUP), configs.engine(SETUP)
    for config in (engine.scheduler, other.scheduler):
        for change in changes:
            change(config)
    geometry = Geometry.of(engine.scheduler, engine.scheduler_kv, 1)
    ours = describe(engine.scheduler, engine.scheduler_kv, geometry)
    assert ours == describe(copy.deepcopy(engine.scheduler), engine.ranks_kv[0], geometry), "a vLLM's own processes disagree"
    return ours != describe(other.scheduler, other.scheduler_kv, geometry)


# Changes of a configuration.


def option(path: str, value: Any) -> Any:
    """Sets one option: `cache_config.cache_dtype`, say."""
    owner, _, name = path.rpartition(".")
    return lambda config: setattr(attrgetter(owner)(config) if owner else config, name, value)


def at(folder: Path | str, **more: Any) -> Any:
    """Serves the model of this folder, with options of its loader, of the model, or of vLLM."""

    def change(config: Any) -> None:
        for name, value in {"model": str(folder), **more}.items():
            owner = next(owner for owner in (config.load_config, config.model_config, config) if hasattr(owner, name))
            setattr(owner, name, value)

    return change


def rope(folder: Path, **parameters: Any) -> Any:
    """A model with another rotary embedding."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": parameters}))
    return at(folder)


def longer(config: Any) -> None:
    """Twice the longest context."""
    config.model_config.original_max_model_len = config.model_config.max_model_len = config.model_config.max_model_len * 2


def fitted(config: Any) -> None:
    """`--max-model-len auto`: the longest context that fits into the memory that there is today."""
    config.model_config.original_max_model_len, config.model_config.max_model_len = -1, os.getpid()


def multimodal(prefix_caching: bool = True, **more: Any) -> Any:
    def change(config: Any) -> None:
        config.model_config.multimodal_config = MultiModalConfig(**more)
        config.cache_config.enable_prefix_caching = prefix_caching

    return change


@pytest.fixture
def model(tmp_path) -> Path:
    """A model's folder, as a mount that anything may be put into."""
    return Path(shutil.copytree(configs._model_dir(), tmp_path / "model"))


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The warnings."""
    lines: list[str] = []
    monkeypatch.setattr(namespace.logger, "warning", lines.append)
    return lines


def follows(file: Path, *changes: Any, **more: Any) -> bool:
    """Does the namespace follow what this file holds, and whether it is there? It must follow both, or neither."""
    names = {named(*changes, **more)}
    file.parent.mkdir(exist_ok=True)
    for number in (1, 2):
        file.write_text(f'{{"rope_theta": {number}}}')
        description = described(*changes, **more)
        assert "instance" not in description, "it is this vLLM's own, whatever the file holds"
        names.add(fingerprint(description))
    assert len(names) in (1, 3)
    return len(names) == 3


# Options, environment variables, plugins.


OPTIONS = [
    ("cache_config.kv_cache_dtype_skip_layers", ["0"]), ("model_config.hf_overrides", {"rope_theta": 5000.0}),
    ("model_config.quantization", "fp8"), ("model_config.quantization_config", {"linear": "mxfp8"}),
    ("model_config.model_impl", "transformers"), ("load_config.load_format", "dummy"),
    ("load_config.model_loader_extra_config", {"distributed": True}), ("load_config.ignore_patterns", ["*.safetensors"]),
    ("cache_config.prefix_caching_hash_algo", "xxhash"), ("cache_config.cache_dtype", "nvfp4_4over6"),
    ("cache_config.cache_dtype", "fp8_e5m2"), ("attention_config.use_prefill_query_quantization", True),
    ("attention_config.disable_flashinfer_q_quantization", True), ("attention_config.flash_attn_version", 3),
    ("attention_config.sparse_mla_force_mqa", True), ("kernel_config.moe_backend", "marlin"),
    ("kernel_config.linear_backend", "cutlass"), ("lora_config", object()),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), OPTIONS)
def test_an_option_that_may_decide_bytes_is_in_the_name(path, value) -> None:
    assert named() == named() != named(option(path, value))


def test_what_is_warmed_up_and_how_much_room_there_is_are_not_in_the_name() -> None:
    """vLLM sets these by --enforce-eager and by the longest context, for every model."""
    for name in ("enable_jit_warmup", "enable_cutedsl_warmup"):
        assert named(option(f"kernel_config.{name}", True)) == named(option(f"kernel_config.{name}", False)) == named()
    assert named(option("attention_config.sparse_mla_prefill_workspace_factor", 2)) == named()


ENVIRONMENT = {
    "it may decide bytes": [
        "VLLM_BATCH_INVARIANT=1", "VLLM_MARLIN_INPUT_DTYPE=int8", "VLLM_CPU_INT4_W4A8=1", "VLLM_USE_DEEP_GEMM=0",
        "VLLM_MOE_ROUTING_SIMULATION_STRATEGY=uniform_random", "VLLM_FLOAT32_MATMUL_PRECISION=medium",
        "VLLM_ROCM_USE_SKINNY_GEMM=0",
        # It says which layers a rank has, and so how large its part of a chunk is: another one could not even be registered.
        "VLLM_PP_LAYER_PARTITION=15,17",
    ],
    "equal deployments differ in it": [
        "VLLM_PORT=1234", "VLLM_HOST_IP=10.0.0.1", "VLLM_DP_RANK=1", "VLLM_LOGGING_LEVEL=DEBUG", "VLLM_CACHE_ROOT=/tmp/cache",
        "VLLM_NIXL_SIDE_CHANNEL_PORT=5600", "VLLM_RPC_TIMEOUT=1", "VLLM_ENGINE_READY_TIMEOUT_S=1", "VLLM_OF_SOMEBODY_ELSE=1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "VLLM_CPU_OMP_THREADS_BIND=0-1", "VLLM_LORA_RESOLVER_CACHE_DIR=/tmp/loras",
        "CUDA_VISIBLE_DEVICES=1",
    ],
    # `override_envs_for_invariance`, and a model that is built without MLA: the scheduler's process has it as it was.
    "vLLM sets it in its workers": [
        "VLLM_MLA_DISABLE=1", "VLLM_ALLREDUCE_USE_SYMM_MEM=0", "VLLM_USE_AOT_COMPILE=0", "VLLM_ROCM_USE_SKINNY_GEMM=0",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("role", "setting"), [(role, setting) for role, settings in ENVIRONMENT.items() for setting in settings])
def test_only_those_environment_variables_that_may_decide_bytes_are_in_the_name(role, setting, monkeypatch) -> None:
    if "workers" in role:
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    variable, value = setting.split("=")
    monkeypatch.delenv(variable, raising=False)
    before = named()
    monkeypatch.setenv(variable, value)
    if "decide" in role:
        assert before != named() == named() == named(worker=True)
    else:
        assert before == named(worker="workers" in role)


def test_a_worker_whose_model_has_changed_the_configuration_agrees_with_the_scheduler() -> None:
    """Models change it while they are built, in the worker's process: if the two differed, nothing would ever be found."""
    assert named(option("model_config.hf_config.set_while_the_model_was_built", True), worker=True) == named()
    theirs = option("model_config.model_arch_config.architectures", ["HYV4ForCausalLM"])
    assert named(theirs) == named(theirs, option("attention_config.sparse_mla_force_mqa", True), worker=True)


def test_the_versions_of_plugins_and_packages_are_in_the_name(monkeypatch) -> None:
    """A plugin may put code of its own in the place of vLLM's."""
    before = named()
    plugins = {"vllm.general_plugins": [], "vllm.platform_plugins": []}
    found, version = importlib.metadata.entry_points, importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [*found(group=group), *plugins[group]])

    def plugin(module: str, version: str) -> Any:
        return SimpleNamespace(name=module, value=module, module=module, dist=SimpleNamespace(name=module, version=version))

    for group in plugins:
        names = {before}
        for number in ("1", "2"):
            plugins[group] = [plugin("theirs.plugin", number)]
            assert named() == named(worker=True)
            names.add(named())
        assert len(names) == 3
        plugins[group] = [plugin("kvring.plugin", "9")]
        assert named() == before
        plugins[group] = []
    plugins["vllm.general_plugins"] = [plugin("theirs", "1")]
    monkeypatch.setenv("VLLM_PLUGINS", "kvring")
    assert named() == before, "it is not loaded"
    monkeypatch.undo()
    for package in ("torchao", "bitsandbytes", "compressed-tensors", "mistral_common", "transformers", "flashinfer-python"):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "version", lambda name, of=package: "0.0.1" if name == of else version(name))
            assert named() != before


def test_a_group_of_several_kinds_of_layers_has_one_name_on_both_sides() -> None:
    """Full attention beside an indexer's cache: a worker is told all layers, the scheduler's side the first of them."""

    def name(worker: bool, head_size: int = 64) -> bytes:
        more = {"block_size": 16, "num_kv_heads": 1, "head_size": head_size, "dtype": torch.float16}
        specs = {"a": MLAAttentionSpec(**more), "b": FullAttentionSpec(**more)}
        engine = configs.engine(SETUP)
        config, cache = (engine.ranks[0], engine.ranks_kv[0]) if worker else (engine.scheduler, engine.scheduler_kv)
        (group,) = cache.kv_cache_groups
        group.kv_cache_spec = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=specs) if worker else specs["a"]
        return fingerprint(describe(config, cache, Geometry.of(config, cache, 1)))

    assert name(worker=False) == name(worker=True)
    assert name(worker=False) != name(worker=False, head_size=128), "another size of a page is another shape of what is stored"


def test_a_description_is_plain_values() -> None:
    """An address, or the order of a set, would be another one in each process."""
    quantization = resolve_quantization_config("fp8_per_tensor", None)
    text = json.dumps(
        described(
            option("model_config.hf_overrides", lambda given: given),
            option("model_config.quantization", "fp8_per_tensor"),
            option("model_config.quantization_config", quantization),
            multimodal(),
        )
    )
    assert " at 0x" not in text


def test_any_difference_is_another_fingerprint() -> None:
    one = {"model": "a", "tensor_parallel": 1}
    assert len(fingerprint(one)) == 32
    assert fingerprint(one) == fingerprint(dict(reversed(one.items())))
    assert len({fingerprint(one), fingerprint(one | {"tensor_parallel": 2}), fingerprint(one | {"more": None})}) == 3


@pytest.mark.parametrize("algorithm", ["xxhash", "xxhash_cbor"])
def test_keys_that_begin_anew_in_each_process_are_warned_of(algorithm, said, monkeypatch) -> None:
    change = option("cache_config.prefix_caching_hash_algo", algorithm)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    described(change)
    monkeypatch.delenv("PYTHONHASHSEED")
    described()
    assert not said
    described(change)
    assert len(said) == 1 and "PYTHONHASHSEED" in said[0]


# Weights, and the files beside them.


def test_other_weights_of_the_same_name_size_and_time_have_another_name(model) -> None:
    """A mount at a fixed path (KServe), images with normalised times, `rsync -t`."""
    weights = model / "model.safetensors"
    stat = weights.stat()
    before = named(at(model))
    weights.write_bytes(b"some"[: stat.st_size])
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights.stat().st_size == stat.st_size and weights.stat().st_mtime_ns == stat.st_mtime_ns
    assert named(at(model)) != before


def test_the_same_weights_elsewhere_or_touched_have_the_same_name(model, tmp_path) -> None:
    before = named(at(model))
    shutil.copytree(model, tmp_path / "copy")
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert named(at(model)) == before == named(at(tmp_path / "copy"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"load_format": "safetensors"}, {"load_format": "fastsafetensors"}),
        ({"load_format": "safetensors"}, {"load_format": "instanttensor"}),
        ({}, {"model_loader_extra_config": {"enable_multithread_load": True, "num_threads": 8}}),
        ({"load_format": "runai_streamer"}, {"load_format": "runai_streamer", "model_loader_extra_config": {"concurrency": 4}}),
    ],
)
def test_how_fast_the_same_files_are_read_is_not_in_the_name(model, one, other) -> None:
    assert named(at(model, **one)) == named(at(model, **other))


DECIDING_FILES = [
    "config.json", "preprocessor_config.json", "quantize_config.json", "params.json", "model.safetensors.index.json",
    "whisper/model.safetensors", "joint.pt",
]  # fmt: skip
OTHER_FILES = ["notes.json", "README.md", "tokenizer_config.json", "generation_config.json", "optimizer.pt", "modeling.py"]


@pytest.mark.parametrize(
    ("name", "decides"), [*((name, True) for name in DECIDING_FILES), *((name, False) for name in OTHER_FILES)]
)
def test_the_name_follows_those_files_that_decide_bytes(model, name, decides) -> None:
    assert follows(model / name, at(model)) == decides


def test_code_counts_where_it_is_run(model, tmp_path) -> None:
    trusted = at(model, trust_remote_code=True)
    assert follows(model / "modeling.py", trusted)
    # Code of another repository, which a folder stands for here.
    code = tmp_path / "elsewhere" / "processing.py"
    processor = model / "preprocessor_config.json"
    processor.write_text(json.dumps({"auto_map": {"AutoProcessor": f"{code.parent}--processing.P"}}))
    assert follows(code, trusted)
    processor.write_text(json.dumps({"auto_map": {"AutoProcessor": ["org/none--processing.P"]}}))
    assert is_private(trusted) and not is_private(at(model))


def test_files_in_other_places_count(model, tmp_path) -> None:
    there = tmp_path / "there"
    assert follows(there / "config.json", at(model, hf_config_path=str(there)))
    overrides = {"quantization_config_file": str(there / "quantization.json")}
    assert follows(there / "quantization.json", at(model, hf_overrides=overrides))
    # `--load-format sharded_state` with a pattern that leads elsewhere.
    pattern = {"pattern": "../shards/rank-{rank}-part-{part}.weights"}
    shards = at(model, load_format="sharded_state", model_loader_extra_config=pattern)
    assert follows(tmp_path / "shards" / "rank-0-part-0.weights", shards)
    assert is_private(at(model, load_format="sharded_state", model_loader_extra_config={"pattern": "{"}))
    # Copies that numpy reads.
    copies = model / "np" / "lm_head.weight"
    assert follows(copies, at(model, load_format="npcache")) and not follows(copies, at(model))


def test_a_model_from_a_hub_is_its_files_in_the_cache(model, tmp_path, monkeypatch) -> None:
    """It does not matter which commit they came with, or whether vLLM has fetched all of the repository."""
    repository = tmp_path / "hub" / "models--org--name"

    def fetched(commit: str, weights: str) -> None:
        snapshot = repository / "snapshots" / commit
        for folder in (snapshot, repository / "blobs", repository / "refs", repository / "trees"):
            folder.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        (repository / "blobs" / weights).touch()
        shutil.copy(model / "config.json", snapshot)
        (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / weights)

    from huggingface_hub import _snapshot_download as hub

    download = hub.snapshot_download
    in_cache = {"cache_dir": repository.parent}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **more: download(*args, **more | in_cache))
    fetched("a" * 40, "1" * 64)
    first = described(at("org/name"))
    assert first["weights"][0] == "content"
    fetched("b" * 40, "1" * 64)
    assert described(at("org/name")) == first
    fetched("c" * 40, "2" * 64)
    assert described(at("org/name")) != first


# Content that no file tells, or that cannot be looked at.


@pytest.mark.parametrize(
    ("more", "version_tells", "word"),
    [
        ({"load_format": "tensorizer"}, True, "kvring.weights_version"),
        ({"load_format": "modelexpress"}, True, "kvring.weights_version"),
        ({"load_format": "ipc_cache"}, True, "kvring.weights_version"),
        ({"load_format": "of_a_plugin"}, True, "kvring.weights_version"),
        ({"model_weights": "s3://bucket/model"}, True, "kvring.weights_version"),
        ({"load_format": "dummy"}, False, ""),
        ({"load_format": "dummy", "quantization": "gptq"}, False, ""),
        ({"hf_overrides": lambda config: config}, False, ""),
        # Both of these have no words that are the same in each process.
        ({"hf_overrides": {1: "a", "1": [1]}}, False, ""),
        ({"hf_overrides": {"a": object()}}, False, ""),
        ({"model": "s3://bucket/model"}, False, ""),
        ({"model": "org/never-fetched"}, False, ""),
        ({"hf_config_path": "org/never-fetched"}, False, ""),
        # Weights that are pushed into a running vLLM.
        ({"weight_transfer_config": object()}, False, "weight_transfer_config"),
    ],
)
def test_what_no_file_tells_is_this_vllms_own_unless_a_version_of_the_weights_does(
    model, more, version_tells, word, said
) -> None:
    change = at(model, **more)
    assert is_private(change) and len(said) == 3 and all(word in line for line in said)
    assert not is_private(at(model))
    one, again, two = (named(change, version=version) for version in "112")
    assert one != two and (one == again) == version_tells


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "quantize_config.json", "modeling.py"])
def test_a_version_of_the_weights_does_not_stand_for_configurations_or_code(model, tmp_path, name) -> None:
    """Two folders of one version may have others."""
    elsewhere = shutil.copytree(model, tmp_path / "elsewhere")
    assert follows(model / name, at(model, load_format="tensorizer", trust_remote_code=True), version="1")
    one, other = (named(at(folder, load_format="tensorizer"), version="1") for folder in (model, elsewhere))
    assert one != other, "a version of one model's is no version of another one's"


def test_a_version_of_the_weights_adds_to_what_is_known(model) -> None:
    assert len({named(at(model), version=version) for version in (None, "1", "2")}) == 3


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["written", "replaced by a link to another one"])
def test_files_that_change_while_vllm_starts_tell_nothing(model, said, name, how) -> None:
    """It may have loaded the files from before. A time is reason to doubt, and never to believe."""
    changed = (model / name).stat().st_ctime_ns
    if how != "written":
        (model / name).rename(model / "other")
        there = max(file.stat().st_ctime_ns for file in model.iterdir())
        while changed < there + 5_000_000:
            (model / name).unlink(missing_ok=True)
            (model / name).symlink_to(model / "other")
            changed = (model / name).lstat().st_ctime_ns
    latest = max(file.lstat().st_ctime_ns for file in model.iterdir())
    before, after = (option("instance_id", str(when)) for when in (changed - 1_000_000, latest + 1_000_000))
    assert not is_private(at(model), after) and not said
    assert is_private(at(model), before) and said
    assert named(at(model), before, version="1") != named(at(model), before, version="1")


NESTED = ['{"a":' + "[" * 200_000 + "]" * 200_000 + "}", '{"rope_scaling": ' + '{"a":' * 50_000 + "1" + "}" * 50_000 + "}"]


@pytest.mark.parametrize("text", NESTED, ids=["lists", "objects"])
def test_a_configuration_that_cannot_be_read_ends_nothing(model, text) -> None:
    (model / "config.json").write_text(text)
    assert is_private(at(model))


@pytest.mark.parametrize("error", [OverflowError(), MemoryError(), RecursionError(), ImportError("no such name")])
def test_whatever_goes_wrong_while_files_are_looked_at_ends_nothing(model, monkeypatch, said, error) -> None:
    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(namespace.identity.content, "digest", fails)
    assert is_private(at(model))
    assert said and all(type(error).__name__ in line or str(error) in line for line in said)


def test_no_weights_too_many_files_and_configurations_that_are_too_large_tell_nothing(model, monkeypatch) -> None:
    content = namespace.identity.content
    monkeypatch.setattr(content, "FILES_MAX", 50)
    assert not is_private(at(model))
    for number in range(60):
        (model / f"{number}.bin").touch()
    assert is_private(at(model))
    monkeypatch.undo()
    assert not is_private(at(model))
    for file in model.glob("*.bin"):
        file.unlink()
    weights = (model / "model.safetensors").rename(model.parent / "weights")
    assert is_private(at(model))
    weights.rename(model / "model.safetensors")
    assert not is_private(at(model))
    os.truncate(model / "config.json", content.READ_WHOLE_MAX + 1)
    assert is_private(at(model))


# The longest context.


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_where_positions_turn_the_same_at_any_length_the_longest_context_is_not_in_the_name(model, kind) -> None:
    change = rope(model, rope_type=kind, factor=2.0)
    built = option("model_config.hf_config.rope_parameters", {"rope_type": "what a model has made of it while it was built"})
    names = named(change), named(change, longer), named(change, fitted), named(change, built, worker=True)
    assert len(set(names)) == 1


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "some_new_one"])
def test_where_all_positions_turn_by_the_longest_context_it_is_in_the_name(model, kind) -> None:
    """Phi-3's long rope takes its short or its long factors, for all positions, by this one."""
    change = rope(model, type=kind, factor=2.0)
    assert named(change) != named(change, longer)
    # vLLM has found its own when the model was built, before it looked at the memory.
    assert named(change, fitted) == named(change, fitted, option("model_config.max_model_len", 64))
    nested = rope(model, full_attention={"rope_type": kind}, sliding_attention={"rope_type": "default"})
    assert named(nested) != named(nested, longer)


@pytest.mark.parametrize("what", ["phi3", "theirs", "overridden", "nothing"])
def test_where_the_rotary_embedding_is_not_told_for_certain_the_longest_context_is_in_the_name(model, what) -> None:
    def change(config: Any) -> None:
        hf_config = config.model_config.hf_config
        if what == "phi3":
            hf_config.model_type = "phi3"
        elif what == "theirs":
            theirs = {"__module__": "transformers_modules.org.config"}
            hf_config.__class__ = type("TheirConfig", (type(hf_config),), theirs)
        elif what == "overridden":
            config.model_config.hf_overrides = {"text_config": {"rope_parameters": {"rope_type": "longrope"}}}

    if what == "nothing":
        (model / "config.json").unlink()
    assert named(at(model), change) == named(at(model), change) != named(at(model), change, longer)


def test_llama_4_tunes_its_temperature_by_the_longest_context(model) -> None:
    here = at(model), option("model_config.hf_config.model_type", "llama4_text")
    before = named(*here)
    assert named(*here, longer) != before
    assert named(*here, option("model_config.override_generation_config", {"x": 1})) != before
    assert follows(model / "generation_config.json", *here)


# Images, sound, video.


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
def test_how_images_are_prepared_is_in_the_name(more) -> None:
    assert named(multimodal()) == named(multimodal()) != named(multimodal(**more))


def test_images_that_vllm_counts_are_its_own(said) -> None:
    """With neither cache vLLM's ids of images are a counter of the process: another image has the same one after a restart."""
    counted = multimodal(prefix_caching=False, mm_processor_cache_gb=0)
    assert not is_private(multimodal(prefix_caching=False)) and not is_private(multimodal(mm_processor_cache_gb=0))
    assert not said
    assert is_private(counted)
    assert said and all("--mm-processor-cache-gb" in line for line in said)
    assert named(counted, version="1") != named(counted, version="1"), "a version of the weights says nothing of images"


def test_scales_of_an_image_encoder_are_their_file_or_this_vllms_own(tmp_path) -> None:
    scales = tmp_path / "scales.json"
    change = multimodal(mm_encoder_attn_dtype="fp8", mm_encoder_fp8_scale_path=str(scales))
    # vLLM reads the file when it makes its configuration; kvring may not find it any more.
    scales.write_text("{}")
    assert follows(scales, change) and not is_private(change)
    assert is_private(lambda _: scales.write_text("2"), change, lambda _: scales.unlink())
    assert is_private(multimodal(mm_encoder_attn_dtype="fp8"))
