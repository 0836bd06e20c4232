"""Sliding windows: blocks that are nobody's, and blocks that are reused. A Gemma-3 has full attention beside them, so two KV
groups, a Mistral nothing else, so one."""

import pytest
from real.compare import assert_same
from real.models import WINDOW
from real.prompts import least_loadable, prompt
from real.scenarios import preemption

LENGTHS = (1, 31, 33, WINDOW, WINDOW + 1, 3 * WINDOW, 321, 700, 2500)


@pytest.fixture(params=["gemma", "mistral"])
def sliding(request):
    """The directory of a model."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("prefix_caching", [False, True], ids=["alone", "prefix-caching"])
def test_cold_and_warm(scene, baseline, sliding, prefix_caching):
    prompts = [prompt(length, length) for length in LENGTHS]
    expected = baseline.answers(sliding, prompts, max_tokens=40)
    vllm = scene.vllm(sliding, enable_prefix_caching=prefix_caching)
    assert_same(vllm.generate(prompts, max_tokens=40), expected, "cold")
    scene.settle(vllm)
    vllm.reset()
    # A store may be dropped: when a window slides on before its block has been read. It is stored again then.
    for pass_ in ("warm", "warmer", "warm at last"):
        warm = vllm.generate(prompts, max_tokens=40)
        assert_same(warm, expected, pass_)
        scene.settle(vllm)
        vllm.reset()
        loaded = [sum(answer["external"]) for answer in warm]
        if all(tokens >= least_loadable(len(ask)) for ask, tokens in zip(prompts, loaded, strict=True)):
            return
    raise AssertionError(f"prompts of {LENGTHS} tokens, and {loaded} loaded after three passes")


def test_preemption(scene, gemma):
    """The window's blocks of a request are given away while it runs: a store of them must not be late."""
    vllm = scene.vllm(gemma, num_gpu_blocks_override=16, max_model_len=224)
    preemption(scene, vllm, [prompt(3000 + i, 10) for i in range(3)], output=197, model=gemma)


def test_failed_loads(scene, baseline, sliding):
    """And what is computed again is as good as any other: it may be stored, and found."""
    prompts = [prompt(length, length) for length in LENGTHS]
    expected = baseline.answers(sliding, prompts, max_tokens=8)
    vllm = scene.vllm(sliding, broken=("every_load_fails",), enable_prefix_caching=True)
    for pass_ in ("cold", "warm", "warmer"):
        assert_same(vllm.generate(prompts, max_tokens=8), expected, pass_)
        scene.settle(vllm)
        if pass_ == "cold":
            vllm.reset()
    assert vllm.calls()["failed_requests"] > 0, "nothing failed"
