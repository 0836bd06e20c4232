"""The engine dies, hangs, comes late, comes back: vLLM serves at its own speed, and uses the cache again when it is there."""

import pytest
from real.compare import assert_same
from real.logs import transitions
from real.prompts import EDGES, least_loadable, prompt

PROMPTS = [prompt(length, length) for length in EDGES]
LONG = [prompt(80 + i, 4096) for i in range(3)]

PLACES = {
    # 4096 tokens are two chunks of prefill of two layers: the third layer is the middle of it.
    "prefill": {"method": "save_kv_layer", "nth": 3, "when": "before"},
    "before-a-load": {"method": "update_state_after_alloc", "nth": 1, "when": "after"},
    "load": {"method": "start_load_kv", "nth": 1, "when": "after"},
    "save": {"method": "wait_for_save", "nth": 1, "when": "after"},
    "idle": None,
}
"""Where the engine is killed: a hook in vLLM's process."""


def restarted_warm(scene, vllm, ask, **params):
    """The engine is started again, and has what was stored before."""
    scene.engine.reap()
    scene.engine.start()
    return scene.hits_are_back(vllm, ask, **params)


@pytest.mark.parametrize("lookup", ["poll", "async"])
@pytest.mark.parametrize("place", PLACES)
def test_killed(scene, baseline, llama, place, lookup):
    expected = baseline.answers(llama, LONG, max_tokens=8)
    vllm = scene.vllm(kvring={"lookup": lookup}, hasty=True)
    assert_same(vllm.generate(LONG[:2], max_tokens=8), expected[:2], "cold")
    scene.settle(vllm)

    # One request that hits, one that is new: so that there are a load and a save.
    asks, right = LONG[1:], expected[1:]
    if PLACES[place] is None:
        vllm.act(action="kill", pid=scene.engine.pid)
    else:
        vllm.hook(action="kill", pid=scene.engine.pid, **PLACES[place])
    assert_same(vllm.generate(asks, max_tokens=8, together=True), right, "while it dies")
    assert vllm.calls()["hooks_left"] == 0, "the engine was not killed"
    assert scene.engine.state() == "dead"
    # vLLM goes on without it, at its own speed.
    dead = vllm.generate(LONG, max_tokens=8)
    assert_same(dead, expected, "without an engine")
    assert not any(answer["cached"] for answer in dead[:1]), "a hit without an engine"

    answer = restarted_warm(scene, vllm, LONG[0], max_tokens=8)
    assert_same([answer], expected[:1], "after the restart")
    assert scene.engine.counters()["warm_start"] == 1
    assert_same(vllm.generate(LONG, max_tokens=8), expected, "all after the restart")

    # Scheduler and worker have each said it once. (On a busy machine a beat may stand still as well.)
    said = transitions(vllm.log_since_ready())
    assert len(said) == 2, said
    for what in said.values():
        assert sum("reason=its process has died" in line for line in what) == 1, said
        assert sum(line.startswith("connected to the kvring engine") for line in what) == 1, said


def test_killed_again_and_again(scene, baseline, llama):
    """The engine dies ten times while requests go on."""
    expected = baseline.answers(llama, PROMPTS, max_tokens=8)
    vllm = scene.vllm(hasty=True)
    vllm.generate(PROMPTS, max_tokens=8)
    scene.settle(vllm)
    for life in range(10):
        method, nth = [("start_load_kv", 2), ("wait_for_save", 3), ("build_connector_meta", 5)][life % 3]
        vllm.hook(action="kill", pid=scene.engine.pid, method=method, nth=nth)
        assert_same(vllm.generate(PROMPTS, max_tokens=8, together=True), expected, f"life {life}")
        restarted_warm(scene, vllm, PROMPTS[-1], max_tokens=8)


def test_stopped_and_continued(scene, baseline, llama):
    """SIGSTOP: no call waits longer than its deadline (`scene` checks that at the end), and vLLM goes on."""
    expected = baseline.answers(llama, PROMPTS, max_tokens=8)
    vllm = scene.vllm(hasty=True)
    vllm.generate(PROMPTS, max_tokens=8)
    scene.settle(vllm)
    scene.engine.pause()
    assert_same(vllm.generate(PROMPTS, max_tokens=8), expected, "while it is stopped")
    assert_same(vllm.generate(PROMPTS, max_tokens=8, together=True), expected, "while it is stopped, together")
    scene.engine.resume()
    assert_same([scene.hits_are_back(vllm, PROMPTS[-1], max_tokens=8)], expected[-1:], "after it goes on")


def test_stopped_in_the_middle(scene, baseline, llama):
    expected = baseline.answers(llama, LONG, max_tokens=8)
    vllm = scene.vllm(hasty=True)
    vllm.generate(LONG[:2], max_tokens=8)
    scene.settle(vllm)
    for method in ("get_num_new_matched_tokens", "start_load_kv", "wait_for_save"):
        vllm.hook(action="stop", pid=scene.engine.pid, method=method)
        assert_same(vllm.generate(LONG, max_tokens=8, together=True), expected, f"stopped in {method}")
        scene.engine.resume()
        assert_same([scene.hits_are_back(vllm, LONG[0], max_tokens=8)], expected[:1], f"after {method}")
        scene.settle(vllm)


def test_an_engine_that_comes_later_is_used(cold_scene, baseline, llama):
    scene = cold_scene
    expected = baseline.answers(llama, PROMPTS, max_tokens=8)
    vllm = scene.vllm(kvring={"register_timeout_ms": 200})
    for pass_ in ("cold", "still cold"):
        answers = vllm.generate(PROMPTS, max_tokens=8)
        assert_same(answers, expected, pass_)
        assert not any(answer["cached"] for answer in answers)
    scene.engine.start()
    scene.hits_are_back(vllm, PROMPTS[-1], max_tokens=8)
    vllm.generate(PROMPTS, max_tokens=8)
    scene.settle(vllm)
    answers = vllm.generate(PROMPTS, max_tokens=8)
    assert_same(answers, expected, "with it")
    assert all(sum(a["external"]) >= least_loadable(len(p)) for p, a in zip(PROMPTS, answers, strict=True))


def test_a_long_silence_changes_nothing(scene, baseline, llama):
    """vLLM says nothing for longer than any timeout of an engine that stalls: nobody is thrown out, the cache stays."""
    expected = baseline.answers(llama, PROMPTS, max_tokens=8)
    vllm = scene.vllm(kvring={"stall_after_ms": 300})
    vllm.generate(PROMPTS, max_tokens=8)
    before = scene.settle(vllm) or scene.engine.counters()
    scene.engine.lives_on(beats=240)
    assert scene.engine.counters()["clients"] == before["clients"]
    answers = vllm.generate(PROMPTS, max_tokens=8)
    assert_same(answers, expected, "after the silence")
    assert all(sum(a["external"]) >= least_loadable(len(p)) for p, a in zip(PROMPTS, answers, strict=True))
    after = scene.engine.counters()
    assert after["attaches"] == before["attaches"], "somebody had to attach again"


def test_vllm_itself_stopped_and_continued(scene, baseline, llama):
    """vLLM stands still in the middle of a request (a debugger, a laptop that sleeps): its leases and its entry stay."""
    from real import actions

    expected = baseline.answers(llama, LONG, max_tokens=8)
    vllm = scene.vllm(kvring={"stall_after_ms": 300})
    vllm.generate(LONG[:2], max_tokens=8)
    before = scene.settle(vllm) or scene.engine.counters()
    names = vllm.add(LONG, max_tokens=8)
    vllm.step()
    actions.stop(vllm.pid)
    scene.engine.lives_on(beats=80)
    actions.resume(vllm.pid)
    vllm.finish()
    answers = vllm.take()
    assert_same([answers[name] for name in names], expected, "after standing still")
    assert scene.engine.counters()["attaches"] == before["attaches"]


def test_autostart(cold_scene, baseline, llama):
    """One command is enough: the engine is started by vLLM, outlives it, and is started again when it died."""
    scene = cold_scene
    expected = baseline.answers(llama, PROMPTS, max_tokens=8)
    options = {"autostart": True, "arena": scene.engine.arena}
    first = scene.vllm(kvring=options)
    assert_same(first.generate(PROMPTS, max_tokens=8), expected, "cold")
    scene.settle(first)
    first.close()
    assert scene.engine.state() == "serving"
    second = scene.vllm(kvring=options)
    answers = second.generate(PROMPTS, max_tokens=8)
    assert_same(answers, expected, "the next vLLM")
    assert sum(answers[-1]["external"]) >= least_loadable(len(PROMPTS[-1])), "the engine ended with its vLLM"

    scene.engine.kill()
    assert_same(second.generate(PROMPTS, max_tokens=8), expected, "while there is none")
    answer = scene.hits_are_back(second, PROMPTS[-1], max_tokens=8)
    assert_same([answer], expected[-1:], "started again")
