"""Two ranks: each stores and loads its half, and nothing counts before both have."""

import pytest
from real.compare import assert_same
from real.prompts import EDGES, least_loadable, prompt
from real.scenarios import minimal_preemption, poisoning

TWO_RANKS = {"tensor_parallel_size": 2, "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}}


@pytest.mark.parametrize("load", ["async", "sync"])
def test_cold_and_warm(scene, baseline, llama, load):
    prompts = [prompt(length, length) for length in EDGES]
    expected = baseline.answers(llama, prompts, max_tokens=16)
    vllm = scene.vllm(kvring={"load": load}, **TWO_RANKS)
    assert_same(vllm.generate(prompts, max_tokens=16), expected, "cold")
    scene.settle(vllm)
    warm = vllm.generate(prompts, max_tokens=16)
    assert_same(warm, expected, "warm")
    missed = [len(ask) for ask, answer in zip(prompts, warm, strict=True) if sum(answer["external"]) < least_loadable(len(ask))]
    assert not missed, f"not found, of prompts of these lengths: {missed}"


@pytest.mark.parametrize("load", ["async", "sync"])
def test_preemption(scene, load):
    minimal_preemption(scene, seed=2000, kvring={"load": load}, **TWO_RANKS)


def test_one_ranks_failed_synchronous_load(scene):
    vllm = scene.vllm(kvring={"load": "sync"}, broken=("first_load_of_rank_one_fails",), **TWO_RANKS)
    poisoning(scene, vllm, seed=33)


def test_one_ranks_failed_asynchronous_load(scene):
    vllm = scene.vllm(kvring={"load": "async"}, broken=("first_load_of_rank_one_fails",), **TWO_RANKS)
    poisoning(scene, vllm, seed=34)
