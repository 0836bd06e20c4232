"""Sliding windows: blocks that are nobody's, and blocks that are reused. A Gemma-3 has full attention beside them, so two KV
groups, a Mistral nothing else, so one."""

import pytest
from make_model import WINDOW
from real.models import model
from real.prompts import least_loadable, prompt
from real.scenarios import preemption

PROMPTS = [prompt(length, length) for length in (1, 31, 33, WINDOW, WINDOW + 1, 3 * WINDOW, 321, 700, 2500)]
SLIDING = pytest.mark.parametrize("architecture", ["swa", "mistral"])


@pytest.mark.parametrize("prefix_caching", [False, True], ids=["alone", "prefix-caching"])
@SLIDING
def test_cold_and_warm_are_answered_alike(scene, architecture, prefix_caching):
    vllm = scene.vllm(model(architecture), enable_prefix_caching=prefix_caching)
    # A store is dropped where a window slides on before its block has been read. It is stored again then.
    for about in ("cold", "warm", "warmer", "warm at last"):
        answers = scene.ask(vllm, PROMPTS, about, max_tokens=40)
        scene.settle(vllm)
        vllm.reset()
        loaded = [sum(answer["external"]) for answer in answers]
        if all(tokens >= least_loadable(len(ask)) for ask, tokens in zip(PROMPTS, loaded, strict=True)):
            return
    raise AssertionError(f"prompts of {[len(ask) for ask in PROMPTS]} tokens, and {loaded} loaded after four passes")


def test_preemption_gives_no_block_of_a_window_away_that_is_read(scene):
    """The window's blocks of a request are given away while it runs: a store of them must not be late."""
    vllm = scene.vllm(model("swa"), num_gpu_blocks_override=16, max_model_len=224)
    preemption(scene, vllm, [prompt(3000 + i, 10) for i in range(3)], output=197)


@SLIDING
def test_what_is_computed_again_after_failed_loads_is_as_good_as_any_other(scene, architecture):
    """Such KV may be stored, and found."""
    vllm = scene.vllm(model(architecture), broken=("every_load_fails",), enable_prefix_caching=True)
    for about in ("cold", "warm", "warmer"):
        scene.ask(vllm, PROMPTS, about)
        scene.settle(vllm)
        if about == "cold":
            vllm.reset()
    assert vllm.calls()["failed_requests"] > 0, "nothing failed"
