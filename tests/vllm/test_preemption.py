"""P0 to P5 when vLLM preempts: fewer blocks than the requests need."""

import pytest
from real.scenarios import minimal_preemption, random_preemption

pytestmark = pytest.mark.no_engine


@pytest.mark.parametrize("load", ["async", "sync"])
@pytest.mark.parametrize("lookup", ["poll", "async"])
def test_the_minimal_case(scene, lookup, load):
    minimal_preemption(scene, kvring={"lookup": lookup, "load": load})


@pytest.mark.parametrize("load", ["async", "sync"])
def test_with_vllms_own_prefix_cache(scene, load):
    minimal_preemption(scene, kvring={"load": load}, enable_prefix_caching=True)


@pytest.mark.parametrize("load", ["async", "sync"])
def test_random_ones(scene, load):
    vllm = scene.vllm(kvring={"load": load}, num_gpu_blocks_override=17, max_model_len=512)
    for seed in range(4):
        random_preemption(scene, vllm, seed, blocks=17, at_once=load == "async")
