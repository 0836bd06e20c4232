"""vLLM wants its blocks, or its cache, back while kvring stores: it has them as soon as it would without kvring."""

import os
import signal
from pathlib import Path

import pytest
from real.compare import assert_same
from real.prompts import BLOCK, prompt
from real.vllm import Vllm
from waiting import wait_for

PROMPTS = [prompt(900 + index, 4 * BLOCK + 5) for index in range(3)]

SLOW = ("stores_begin_late",)
"""A store path slower than the model."""

OWN = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
"""vLLM's engine core in a process of its own, as `vllm serve` has it: it steps by itself, and ends by itself. In the process of
its caller it does not step any more after the last token."""


@pytest.mark.parametrize("environment", [{}, OWN], ids=["in-process", "own-process"])
@pytest.mark.parametrize("what", ["reset", "reset_with_connector", "sleep"])
def test_a_reset_right_after_the_last_token_is_done_or_refused_as_without_kvring(scene, zygote, what, environment):
    """Trainers reset vLLM like this when they update weights. Sleep resets every cache too, and raises where it
    cannot. (On CPU it keeps its memory.)"""

    def resets(vllm: Vllm) -> list[bool]:
        done = []
        for _ in range(3):
            assert_same(vllm.generate(PROMPTS, max_tokens=8, together=True), scene.right(vllm.model, PROMPTS), what)
            if what == "sleep":
                vllm.sleep(level=1)
                vllm.wake_up()
            else:
                done.append(vllm.reset(connector=what == "reset_with_connector", at_once=True))
        return done

    vllm = scene.vllm(broken=SLOW, environment=environment, enable_prefix_caching=True)
    with Vllm(zygote, vllm.model, environment=environment, enable_prefix_caching=True) as plain:
        right = resets(plain)
    assert resets(vllm) == right
    assert all(right) or environment, "in its caller's process nothing holds a block of vLLM's"
    assert scene.engine.counters()["shards_reserved"] > 0, "nothing was stored: this test tests nothing"


def test_a_vllm_that_is_asked_to_end_says_so_to_the_engine(scene):
    """SIGTERM, as vLLM sends it to its own core. (`vllm serve` sends SIGKILL at once after it, without `--shutdown-timeout`.)"""
    vllm = scene.vllm(environment=OWN)
    vllm.generate(PROMPTS, max_tokens=4)
    before = scene.engine.counters()
    assert before["clients"] == 2
    for child in Path(f"/proc/{vllm.pid}/task/{vllm.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGTERM)
    wait_for(lambda: scene.engine.counters()["clients"] == 0, "scheduler and worker have left")
    after = scene.engine.counters()
    assert (after["detaches"] - before["detaches"], after["deaths"]) == (2, 0)


def test_resets_of_running_requests_in_traffic_change_no_answer(scene):
    asks = [prompt(920 + index, 2 * BLOCK + 5 * index) for index in range(8)]
    vllm = scene.vllm(broken=SLOW, enable_prefix_caching=True)
    names, right = [], []
    for pair in (asks[at : at + 2] for at in range(0, len(asks), 2)):
        for ask, tokens in zip(pair, (4, 24), strict=True):
            names += vllm.add([ask], max_tokens=tokens)
            right += scene.right(vllm.model, [ask], tokens)
        vllm.step(times=6)
        assert vllm.reset(running=True, at_once=True)
    vllm.finish()
    answers = vllm.take()
    assert_same([answers[name] for name in names], right, "with resets")


def test_a_store_path_slower_than_the_model_does_not_slow_it_down(scene, zygote):
    """16 requests, with room for two of them: each store would begin fifty steps late."""
    tight = {"num_gpu_blocks_override": 13, "max_model_len": 192}
    asks = [prompt(940 + index, 5 * BLOCK - 4) for index in range(16)]
    vllm = scene.vllm(broken=SLOW, **tight)
    with Vllm(zygote, vllm.model, **tight) as plain:
        plain.generate(asks, max_tokens=8, together=True)
        without = plain.counted_steps()
    scene.ask(vllm, asks, "with a slow store path", together=True)
    steps = vllm.counted_steps()
    assert steps <= 1.5 * without, f"{steps} steps, {without} without kvring"


def test_the_engine_is_restarted_cold_while_a_request_with_its_hit_waits_for_room(scene):
    """With vLLM's default policy a load that fails ends its request."""
    waits, runs = prompt(960, 5 * BLOCK + 3), prompt(961, 7 * BLOCK)
    vllm = scene.vllm(policy="fail", num_gpu_blocks_override=13, max_model_len=320)
    expected = scene.right(vllm.model, [waits]) + scene.right(vllm.model, [runs], 40)
    vllm.generate([waits], max_tokens=8)
    scene.settle(vllm)
    (running,) = vllm.add([runs], max_tokens=40)
    vllm.step(times=2)
    (waiting,) = vllm.add([waits], max_tokens=8)
    while not vllm.act("has_found", request=waiting):
        vllm.step()
    scene.engine.kill()
    scene.engine.start("--cold")
    vllm.act("attached")
    vllm.finish()
    answers = vllm.take()
    assert_same([answers[waiting], answers[running]], expected, "after the restart")
    assert answers[waiting]["finish_reason"] == "length"


def test_the_counters_of_metrics_are_what_requests_got_and_what_the_engine_has(scene):
    asks = [prompt(980 + index, length) for index, length in enumerate((20, 3 * BLOCK + 1, 6 * BLOCK))]
    vllm = scene.vllm(disable_log_stats=False)

    def counted(*names: str) -> list[float]:
        vllm.drain()
        return [vllm.act("metric", name=f"vllm:kvring_{name}") for name in names]

    scene.ask(vllm, asks, "cold", max_tokens=4)
    stored = scene.settle(vllm)["shards_committed"]
    assert counted("lookups", "lookup_tokens", "hit_tokens") == [2, 9 * BLOCK + 1, 0], "20 tokens are no block"
    assert counted("store_chunks") == [9] == [stored]
    vllm.reset()
    warm = scene.ask(vllm, asks, "warm", max_tokens=4)
    scene.settle(vllm)
    assert counted("lookups", "hit_tokens", "loads", "loads_failed") == [4, 9 * BLOCK, 2, 0]
    assert counted("load_tokens") == [sum(sum(answer["external"]) for answer in warm)] != [0]
    assert counted("lookups_not_serving", "lookups_cut", "lookups_degraded", "errors") == [0, 0, 0, 0]
    scene.engine.kill()
    vllm.reset()
    scene.ask(vllm, asks, "while the engine is dead", max_tokens=4)
    assert counted("lookups", "lookups_not_serving", "lookups_degraded") == [6, 2, 0]
    assert counted("hit_tokens", "loads", "loads_failed") == [18 * BLOCK, 4, 0]
    scene.engine.start()
