"""kvring does not overrule what vLLM has decided for a model or a configuration: it refuses, and says why."""

from types import SimpleNamespace
from typing import Any

import pytest
import vllm.envs as envs
from harness.config import Setup, vllm_config
from vllm.config import VllmConfig
from vllm.config.pooler import PoolerConfig
from vllm.platforms import current_platform

from kvring import ConfigError, LayoutError
from kvring.vllm.config import Config
from kvring.vllm.decisions import check


@pytest.fixture(scope="module")
def plain() -> VllmConfig:
    """A real configuration, of a model that has nothing special."""
    return vllm_config(Setup(connector="KvringConnector", connector_module="kvring.vllm"))


def judge(config: VllmConfig, *, groups: int = 1, windows: bool = False, loads: bool = True, **options: Any) -> None:
    geometry = SimpleNamespace(groups=(None,) * groups, has_windows=windows)
    check(Config(**options), config, geometry, loads=loads)  # type: ignore[arg-type]


def test_kvring_works_with_and_without_vllms_prefix_cache(plain: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for enabled in (True, False):
        monkeypatch.setattr(plain.cache_config, "enable_prefix_caching", enabled)
        judge(plain)


@pytest.mark.parametrize("enabled", [True, False], ids=["on", "off"])
@pytest.mark.parametrize(
    ("pooler", "refused"),
    [
        (PoolerConfig(seq_pooling_type="MEAN"), "MEAN"),
        (PoolerConfig(seq_pooling_type="CLS"), "CLS"),
        (PoolerConfig(seq_pooling_type="LAST", tok_pooling_type="STEP"), "STEP"),
        (PoolerConfig(seq_pooling_type="LAST", tok_pooling_type="ALL"), None),
    ],
    ids=["MEAN", "CLS", "STEP", "LAST"],
)
def test_a_pooling_that_needs_the_whole_prompt_is_refused(
    plain: VllmConfig, monkeypatch: pytest.MonkeyPatch, pooler: PoolerConfig, refused: str | None, enabled: bool
) -> None:
    """Also where the user insists on vLLM's prefix cache, which vLLM warns of only."""
    monkeypatch.setattr(plain.model_config, "pooler_config", pooler)
    monkeypatch.setattr(plain.cache_config, "enable_prefix_caching", enabled)
    if refused is None:
        judge(plain)
    else:
        with pytest.raises(LayoutError, match=refused):
            judge(plain)


def test_mla_on_a_cpu_is_refused_where_vllm_does_without_its_cache(plain: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(plain.model_config), "use_mla", property(lambda self: True))
    monkeypatch.setattr(plain.cache_config, "enable_prefix_caching", False)
    with pytest.raises(LayoutError, match="MLA"):
        judge(plain)
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    judge(plain)


def test_batch_invariance_without_vllms_cache_is_refused(plain: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True)
    monkeypatch.setattr(plain.cache_config, "enable_prefix_caching", True)
    judge(plain)
    monkeypatch.setattr(plain.cache_config, "enable_prefix_caching", False)
    with pytest.raises(LayoutError, match="VLLM_BATCH_INVARIANT"):
        judge(plain)


def test_routed_experts_cannot_be_returned_where_kv_is_loaded(plain: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain.aux_output_config, "enable_return_routed_experts", True)
    with pytest.raises(ConfigError, match="--enable-return-routed-experts"):
        judge(plain)
    judge(plain, loads=False)


def test_a_synchronous_load_is_refused_where_its_failure_cannot_be_taken_back(
    plain: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge(plain, load="sync")
    with pytest.raises(ConfigError, match=r"kvring\.load: .*2 KV groups"):
        judge(plain, load="sync", groups=2)
    with pytest.raises(ConfigError, match=r"kvring\.load: .*sliding window"):
        judge(plain, load="sync", windows=True)
    judge(plain, load="async", groups=2, windows=True)
    for owner, name, value in (
        (plain.scheduler_config, "async_scheduling", True),
        (plain.parallel_config, "pipeline_parallel_size", 2),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            with pytest.raises(ConfigError, match=r"kvring\.load: .*--no-async-scheduling"):
                judge(plain, load="sync")
            judge(plain, load="async")
