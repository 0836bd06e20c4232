"""No error inside kvring is raised into vLLM, which gets an answer with which it goes on."""

import logging

import pytest
from harness.support import worker_side

from kvring import DeviceError
from kvring.vllm import guard
from kvring.vllm.guard import fail_open
from kvring.vllm.metadata import KvringMetadata, Load


class Connector:
    """A small connector with guarded methods."""

    errors = 0

    def count_error(self) -> None:
        self.errors += 1

    @fail_open(lambda self, number: -number)
    def call(self, number: int) -> int:
        return 10 // number if number else self.missing  # type: ignore[attr-defined]

    @fail_open(lambda self: 1 / 0)
    def hopeless(self) -> object:
        raise ValueError("x")

    @fail_open(lambda self: None)
    def stopped(self) -> None:
        raise KeyboardInterrupt


def test_an_error_is_answered_and_told_once_for_each_kind(caplog: pytest.LogCaptureFixture) -> None:
    guard._told.clear()
    connector = Connector()
    assert connector.call(5) == 2 and connector.errors == 0
    with caplog.at_level(logging.INFO, logger="vllm.kvring"):
        assert [connector.call(0) for _ in range(3)] == [0, 0, 0]
        assert connector.hopeless() is None
    assert connector.errors == 4
    told = [record.getMessage() for record in caplog.records]
    assert sum("AttributeError" in line for line in told) == 1, "once for each kind"
    assert all(line.startswith("kvring: ") for line in told), told
    assert any("ValueError: x" in line for line in told) and any("ZeroDivisionError" in line for line in told)
    assert not any("Traceback" in line for line in told)


def test_an_interrupt_is_not_caught() -> None:
    with pytest.raises(KeyboardInterrupt):
        Connector().stopped()


def test_every_method_that_vllm_calls_after_start_is_guarded() -> None:
    """The others are harmless by themselves: they are listed here, and their docstrings say why."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA

    from kvring.vllm import KvringConnector

    harmless = {
        "bind_kv_cache_manager", "wait_for_layer_load", "save_kv_layer", "register_kv_caches", "requires_kv_delivery",
        "get_finished_count", "build_kv_connector_stats", "build_prom_metrics", "get_required_kvcache_layout",
    }  # fmt: skip
    calls = {name for base in (KVConnectorBase_V1, SupportsHMA) for name in vars(base) if not name.startswith("_")}
    ours = {name: value for name, value in vars(KvringConnector).items() if name in calls}
    assert harmless <= set(ours)
    unguarded = {name for name, value in ours.items() if not hasattr(value, "__wrapped__")} - harmless
    assert unguarded == set()


def test_a_lost_device_ends_vllm() -> None:
    """The one exception: a GPU that may still write into blocks which vLLM takes for its own."""

    class Lost(Connector):
        @fail_open(lambda self: None)
        def collect(self) -> None:
            raise DeviceError("lost")

    with pytest.raises(DeviceError):
        Lost().collect()


@pytest.mark.parametrize("wait", [False, True])
def test_a_load_that_may_still_write_is_not_reported_as_failed(wait: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    side, recorder = worker_side(monkeypatch)
    recorder.raises = dict.fromkeys(("wait", "finished"), DeviceError("lost"))
    meta = KvringMetadata(loads=[Load(job=1, request="r", tokens=16, wait=wait, handles=b"x", blocks=[1, 2])])
    with pytest.raises(DeviceError):
        side.start_loads(meta)
        side.collect(meta)
    assert side._outcomes == {} and side.take_transfer_results() == (set(), set()) and side.take_invalid_blocks() == set()
