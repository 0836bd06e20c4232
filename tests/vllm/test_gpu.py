"""The connector with a cache on a GPU: stand-ins for torch's tensors and streams, and the fake CUDA driver of
`gpu-kernels/tests/fake`, whose device memory is this process's."""

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import memory
from harness.scenario import passes
from harness.support import Recorder, target, worker_side
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, MLAAttentionSpec, create_kv_cache_views
from vllm.v1.kv_cache_layout import KVCacheLayout

sys.path.append(str(Path(__file__).parents[2] / "adapter" / "python" / "tests"))

from fake_gpu import Cuda, driver, with_driver

import kvring
from kvring import KvGroup, LayoutError
from kvring.vllm import KvringConnector, namespace
from kvring.vllm import connector as connector_module
from kvring.vllm.content import Unknown
from kvring.vllm.metadata import KvringMetadata, Load, Store
from kvring.vllm.worker import WorkerSide, cuda_device

__all__ = ["driver"]


class OnGpu:
    """A tensor that says it is on a GPU."""

    def __init__(self, view: torch.Tensor, index: int | None = 0) -> None:
        self._view = view
        self.device = torch.device("cuda", index) if index is not None else torch.device("cuda")

    def __getattr__(self, name: str) -> Any:
        assert name in ("data_ptr", "shape", "stride", "element_size"), name
        return getattr(self._view, name)


def on(device: str) -> Any:
    return SimpleNamespace(device=torch.device(device))


def test_a_cache_is_on_one_device_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("the CPU's path must not touch CUDA"))
    assert cuda_device({}) is None and cuda_device({"a": on("cpu"), "b": on("cpu")}) is None
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert cuda_device({"a": on("cuda:2"), "b": on("cuda:2")}) == 2
    assert cuda_device({"a": on("cuda"), "b": on("cuda:3")}) == 3
    for devices, why in [
        (
            ["cuda:1", "cuda:0"],
            "KV group 0, layer b: expected a tensor on cuda:1, where KV group 0, layer a is, got one on cuda:0",
        ),
        (["cpu", "cuda:0"], "layer b: expected a tensor on cpu, where .* got one on cuda:0"),
        (["cuda:0", "cpu"], "layer b: expected a tensor on cuda:0, where .* got one on cpu"),
        (["xpu:0", "xpu:0"], "layer a: expected a tensor on cpu or cuda, got one on xpu:0: kvring cannot copy"),
    ]:
        with pytest.raises(LayoutError, match=why):
            cuda_device({f"KV group 0, layer {name}": on(device) for name, device in zip("ab", devices, strict=True)})


def side(
    monkeypatch: pytest.MonkeyPatch, *, zeroing: bool = False, gpu: bool = True, may_sleep: bool = False
) -> tuple[WorkerSide, Recorder]:
    """A worker's side with a cache on a GPU, or in host memory."""
    options = {"kvring.copy": "staged"} if gpu else {}
    made, recorder = worker_side(monkeypatch, options=options, may_sleep=may_sleep)
    tensor = torch.zeros(4, 2, 16, 8)
    cache = {"a": OnGpu(tensor, 1) if gpu else tensor}
    # Listed twice by the V2 runner: layer b shares layer a's.
    cache["b"] = cache["a"]
    groups = [SimpleNamespace(layer_names=["a", "b"])]
    config: Any = SimpleNamespace(num_blocks=4, kv_cache_groups=groups, needs_kv_cache_zeroing=zeroing)
    made.register_kv_caches(cache, config)
    return made, recorder


def carried_out(made: WorkerSide, recorder: Recorder) -> list[tuple[str, Any]]:
    """The calls of the adapter in a step with two loads, of which the second is synchronous, and a store."""
    made.start_loads(META)
    made.start_stores(META)
    return recorder.calls[1:]


META = KvringMetadata(
    loads=[Load(1, "r", 16, False, (b"x",), [1]), Load(2, "s", 16, True, (b"x",), [2])],
    stores=[Store(3, "t", (1, 1), None, [bytes(16)], [3])],
)


def test_each_call_names_the_stream_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = iter([0x10, 0x20, 0x30])
    asked: list[Any] = []

    def current_stream(device: Any) -> Any:
        asked.append(device)
        return SimpleNamespace(cuda_stream=next(streams))

    made, recorder = side(monkeypatch)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    assert recorder.options["copy"] == "staged" and made.device == 1
    assert carried_out(made, recorder) == [("load", 0x10), ("load", 0x20), ("wait", 3), ("store", 0x30)]
    assert recorder.calls[0] == ("register", 1)
    assert asked == [1, 1, 1]


def test_host_memory_has_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: pytest.fail("the CPU's path must not touch CUDA"))
    made, recorder = side(monkeypatch, gpu=False, zeroing=True, may_sleep=True)
    assert carried_out(made, recorder) == [("load", None), ("load", None), ("wait", 3), ("store", None)]
    assert recorder.calls[0] == ("register", None)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch has one stream, number 1."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1))


def test_a_job_that_cannot_be_submitted_is_dropped_and_reported(monkeypatch: pytest.MonkeyPatch, stream: None) -> None:
    made, recorder = side(monkeypatch)
    recorder.raises = dict.fromkeys(("load", "store"), RuntimeError("the stream is being captured into a CUDA graph"))
    carried_out(made, recorder)
    meta = made.take_worker_meta()
    assert meta is not None and all(outcome.ranks_failed == 1 for outcome in meta.outcomes.values())
    assert set(meta.outcomes) == {1, 2, 3}
    assert made.take_transfer_results() == ({"r"}, set()) and made.take_invalid_blocks() == {1, 2}


def test_where_vllm_clears_blocks_before_it_says_so_stores_have_read_by_then(
    monkeypatch: pytest.MonkeyPatch, stream: None
) -> None:
    made, recorder = side(monkeypatch, zeroing=True)
    made.start_stores(META)
    assert recorder.calls[-2:] == [("store", 1), ("flush", None)]
    recorder.calls.clear()
    made.start_stores(KvringMetadata())
    assert recorder.calls == []


def test_a_vllm_that_may_sleep_has_no_copy_between_steps(monkeypatch: pytest.MonkeyPatch, stream: None) -> None:
    made, recorder = side(monkeypatch, may_sleep=True)
    calls = [("load", 1), ("wait", 2), ("load", 1), ("wait", 4), ("store", 1), ("flush", None)]
    assert carried_out(made, recorder) == calls


@pytest.mark.parametrize(
    ("layout", "planes"), [("BLHNC", 1), ("BLNHC", 1), ("BHLNC", 1), ("LBHNC", 3), ("LBNHC", 3), ("LHBNC", 6)]
)
@pytest.mark.parametrize("mla", [False, True])
def test_a_block_has_as_many_pieces_as_its_layout_says(layout: str, planes: int, mla: bool) -> None:
    """By vLLM's own code: blocks outermost are one piece, layers outermost one for each layer, heads outermost one for each."""
    sizes: dict[str, Any] = {"block_size": 16, "head_size": 8, "dtype": torch.float16}
    spec = MLAAttentionSpec(num_kv_heads=1, **sizes) if mla else FullAttentionSpec(num_kv_heads=2, **sizes)
    names = ["2", "0", "1"]
    cache_config = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: KVCacheLayout[layout],
        num_gpu_blocks_override=5,
        prefix_cache_retention_interval=None,
    )
    config: Any = SimpleNamespace(cache_config=cache_config, attention_config=SimpleNamespace(hisparse_config=None))
    made = get_kv_cache_config_from_groups(config, [KVCacheGroupSpec(names, spec)], 1 << 20)
    (tensor,) = made.kv_cache_tensors
    raw = torch.zeros(tensor.size, dtype=torch.int8)
    views = create_kv_cache_views(raw, spec, made.num_blocks, KVCacheLayout[layout], tensor)
    tensors = [(view.data_ptr(), tuple(view.shape), tuple(view.stride()), view.element_size()) for view in views]
    group = KvGroup(made.num_blocks, 1, tensors)
    expected = planes // 2 if mla and layout == "LHBNC" else planes
    assert len(group.planes) == expected and group.block_bytes == 3 * spec.page_size_bytes
    if expected == 1:
        assert group.planes == [(raw.data_ptr(), 3 * spec.page_size_bytes, 3 * spec.page_size_bytes)]


def test_the_layout_is_asked_for_on_a_gpu_where_no_block_may_have_to_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    def wanted(**cache: Any) -> str | None:
        settings = {"user_specified_block_size": False, "block_size": 128, "kv_cache_dtype_skip_layers": []}
        config: Any = SimpleNamespace(
            cache_config=SimpleNamespace(**(settings | cache)),
            kv_transfer_config=SimpleNamespace(kv_connector_extra_config={}),
            model_config=SimpleNamespace(is_hybrid=False),
        )
        return KvringConnector.get_required_kvcache_layout(config)

    # Another test may have imported it; vLLM imports it only where it is used.
    monkeypatch.delitem(sys.modules, connector_module._MULTI_CONNECTOR, raising=False)
    assert wanted() is None, "on CPU"
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    assert wanted() == "BLHNC" and KVCacheLayout["BLHNC"].is_block_outermost
    assert wanted(user_specified_block_size=True, block_size=64) == "BLHNC"
    assert wanted(user_specified_block_size=True) is None, "kernels of 64 tokens would have to split it"
    assert wanted(kv_cache_dtype_skip_layers=["0"]) is None


class Gpus:
    """vLLM's platform on a machine with NVML: physical GPUs by name."""

    device_name = "cuda"

    def __init__(self, *names: str) -> None:
        self.names = names

    def is_cpu(self) -> bool:
        return False

    def get_device_name(self, device_id: int = 0) -> str:
        return self.names[device_id]


def test_kinds_of_gpu_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms

    def platform(*names: str, ranks: int = 1, replica: int = 0) -> list[str]:
        monkeypatch.setattr(vllm.platforms, "current_platform", Gpus(*names))
        return namespace._platform(config(ranks, replica))

    def config(ranks: int, replica: int = 0) -> Any:
        parallel = SimpleNamespace(
            world_size=ranks, distributed_executor_backend="mp", data_parallel_backend="mp", assigned_physical_gpu_ids=None,
            data_parallel_rank_local=replica, data_parallel_index=replica,
        )  # fmt: skip
        transfer = SimpleNamespace(engine_id="e")
        return SimpleNamespace(parallel_config=parallel, instance_id="i", kv_transfer_config=transfer)

    assert platform("H100", "A100") == ["cuda", "H100"] != platform("A100")
    assert platform("H100", "A100", ranks=2) == ["cuda", "H100", "A100"]
    assert platform("H100", "A100", replica=1) == ["cuda", "A100"]
    # `describe` makes the namespace this vLLM's own then (`test_unit_namespace.py`).
    with pytest.raises(Unknown, match="cannot tell which GPUs"):
        platform("H100", ranks=2)
    monkeypatch.setattr(vllm.platforms, "current_platform", Gpus("A100", "H100"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    namespace.check_gpu(config(2), 1, 1)
    namespace.check_gpu(config(4), 3, 3)
    with pytest.raises(LayoutError, match="CUDA_DEVICE_ORDER"):
        namespace.check_gpu(config(2), 0, 0)


@pytest.mark.parametrize("copy", ["batch", "staged", "zerocopy"])
@with_driver(FAKE_CUDA_DELAY_US="100")
def test_the_obligations_hold_in_random_scenarios(request: pytest.FixtureRequest, copy: str) -> None:
    """With the cache in the fake's device memory."""
    cuda = Cuda()
    patch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    engine: kvring.Engine = request.getfixturevalue("engine")

    def allocate(size: int) -> torch.Tensor:
        return torch.frombuffer((ctypes.c_int8 * size).from_address(cuda.alloc(size)), dtype=torch.int8)

    patch.setattr(memory, "allocate", allocate)
    patch.setattr(memory, "given", lambda views: {name: OnGpu(view) for name, view in views.items()})
    patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=cuda.stream))
    patch.setattr("kvring.vllm.connector.check_gpu", lambda *_: None)
    totals = passes(lambda: target(engine, options={"copy": copy}), range(8))
    assert totals["hits"] and cuda.library.fake_cuda_calls(b"cuEventRecord")
