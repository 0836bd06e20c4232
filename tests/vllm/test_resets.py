"""vLLM wants its blocks, or its cache, back while kvring stores: it has them as soon as it would without kvring."""

import pytest
from real.compare import assert_same
from real.prompts import BLOCK, prompt
from real.vllm import Vllm

PROMPTS = [prompt(900 + index, 4 * BLOCK + 5) for index in range(3)]

SLOW = ("stores_begin_late",)
"""A store path slower than the model."""


def test_a_reset_right_after_the_last_token(scene, baseline, llama):
    """As trainers do it that update weights. In-process nobody steps any more by then."""
    expected = baseline.answers(llama, PROMPTS, max_tokens=8)
    vllm = scene.vllm(broken=SLOW, enable_prefix_caching=True)
    for connector in (False, True, False):
        assert_same(vllm.generate(PROMPTS, max_tokens=8, together=True), expected, "before the reset")
        assert vllm.reset(connector=connector, at_once=True), "vLLM goes on with what it had cached"


def test_sleep_right_after_the_last_token(scene, baseline, llama):
    """It resets every cache, and raises where it cannot. (On CPU it keeps its memory.)"""
    expected = baseline.answers(llama, PROMPTS, max_tokens=8)
    vllm = scene.vllm(broken=SLOW, enable_prefix_caching=True)
    for _ in range(2):
        assert_same(vllm.generate(PROMPTS, max_tokens=8, together=True), expected, "awake")
        vllm.sleep(level=1)
        vllm.wake_up()


def test_a_reset_of_running_requests_in_traffic(scene, baseline, llama):
    asks = [prompt(920 + index, 2 * BLOCK + 5 * index) for index in range(8)]
    expected = baseline.answers(llama, asks, max_tokens=24)
    vllm = scene.vllm(broken=SLOW, enable_prefix_caching=True)
    names = []
    for index in range(0, len(asks), 2):
        names += vllm.add(asks[index : index + 1], max_tokens=4)
        names += vllm.add(asks[index + 1 : index + 2], max_tokens=24)
        vllm.step(times=6)
        assert vllm.reset(running=True, at_once=True)
    vllm.finish()
    answers = vllm.take()
    short = [{**one, "tokens": one["tokens"][:4], "logprobs": one["logprobs"][:4]} for one in expected]
    right = [(short if index % 2 == 0 else expected)[index] for index in range(len(asks))]
    assert_same([answers[name] for name in names], right, "with resets")


def test_a_store_path_slower_than_the_model(scene, baseline, llama, zygote):
    """16 requests, with room for two of them: each store would begin fifty steps late."""
    tight = {"num_gpu_blocks_override": 13, "max_model_len": 192}
    asks = [prompt(940 + index, 5 * BLOCK - 4) for index in range(16)]
    expected = baseline.answers(llama, asks, max_tokens=8)
    with Vllm(zygote, llama, **tight) as plain:
        plain.generate(asks, max_tokens=8, together=True)
        without = plain.counted_steps()
    vllm = scene.vllm(broken=SLOW, **tight)
    assert_same(vllm.generate(asks, max_tokens=8, together=True), expected, "with a slow store path")
    steps = vllm.counted_steps()
    assert steps <= 1.5 * without, f"{steps} steps, {without} without kvring"


@pytest.mark.parametrize("lookup", ["poll", "async"])
def test_the_engine_is_restarted_cold_while_a_request_with_its_hit_waits_for_room(scene, baseline, llama, lookup):
    """With vLLM's default policy a load that fails ends its request."""
    waits, runs = prompt(960, 5 * BLOCK + 3), prompt(961, 7 * BLOCK)
    expected = baseline.answers(llama, [waits], max_tokens=8) + baseline.answers(llama, [runs], max_tokens=40)
    vllm = scene.vllm(policy="fail", kvring={"lookup": lookup}, num_gpu_blocks_override=13, max_model_len=320)
    vllm.generate([waits], max_tokens=8)
    scene.settle(vllm)
    (running,) = vllm.add([runs], max_tokens=40)
    vllm.step(times=2)
    (waiting,) = vllm.add([waits], max_tokens=8)
    while not vllm.act(action="has_found", request=waiting):
        vllm.step()
    scene.engine.kill()
    scene.engine.start("--cold")
    vllm.act(action="attached")
    vllm.finish()
    answers = vllm.take()
    assert_same([answers[waiting], answers[running]], expected, "after the restart")
    assert answers[waiting]["finish_reason"] == "length"


def test_counters(scene, baseline, llama):
    """Those of `/metrics`, beside what the requests got and what the engine has."""
    asks = [prompt(980 + index, length) for index, length in enumerate((20, 3 * BLOCK + 1, 6 * BLOCK))]
    expected = baseline.answers(llama, asks, max_tokens=4)
    vllm = scene.vllm(disable_log_stats=False)

    def counted(*names: str) -> list[float]:
        vllm.drain()
        return [vllm.act(action="metric", name=f"vllm:kvring_{name}") for name in names]

    def asked(about: str) -> list[dict]:
        answers = vllm.generate(asks, max_tokens=4)
        assert_same(answers, expected, about)
        if scene.engine.state() == "serving":
            scene.settle(vllm)
        return answers

    asked("cold")
    assert counted("lookups", "lookup_tokens", "hit_tokens") == [2, 9 * BLOCK + 1, 0], "20 tokens are no block"
    assert counted("store_chunks") == [9] == [scene.engine.counters()["shards_committed"]]
    vllm.reset()
    warm = asked("warm")
    assert counted("lookups", "hit_tokens", "loads", "loads_failed") == [4, 9 * BLOCK, 2, 0]
    assert counted("load_tokens") == [sum(sum(answer["external"]) for answer in warm)] != [0]
    assert counted("lookups_degraded", "lookups_timed_out", "errors") == [0, 0, 0]
    scene.engine.kill()
    vllm.reset()
    asked("without an engine")
    assert counted("lookups", "lookups_degraded") == [6, 2]
    scene.engine.start()
