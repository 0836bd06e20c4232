"""P0 to P5 when vLLM preempts: fewer blocks than the requests need."""

import pytest
from real.scenarios import TWO_RANKS, minimal_preemption, random_preemption

LOADS = pytest.mark.parametrize("load", ["async", "sync"])


@LOADS
def test_the_minimal_case_is_right(scene, load):
    minimal_preemption(scene, kvring={"load": load})


@LOADS
@pytest.mark.parametrize("more", [{"enable_prefix_caching": True}, TWO_RANKS], ids=["prefix-caching", "two-ranks"])
def test_it_is_right_with_vllms_own_prefix_cache_and_with_two_ranks(scene, load, more):
    minimal_preemption(scene, seed=2000, kvring={"load": load}, **more)


@LOADS
def test_random_cases_are_right(scene, load):
    vllm = scene.vllm(kvring={"load": load}, num_gpu_blocks_override=17, max_model_len=512)
    have_loaded = [random_preemption(scene, vllm, seed, blocks=17, at_once=load == "async") for seed in range(4)]
    assert any(have_loaded), "no resumed request loaded anything: this test tests nothing"
