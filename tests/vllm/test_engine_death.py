"""The engine dies, hangs, comes late, comes back: vLLM serves at its own speed, and finds and loads what was stored before."""

import threading
import time

import pytest
from real import actions
from real.compare import assert_loaded, assert_same
from real.logs import transitions
from real.prompts import EDGES, prompt

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


def warmed(scene, prompts, **options):
    """A vLLM that has stored these prompts."""
    vllm = scene.vllm(**options)
    scene.ask(vllm, prompts, "cold")
    scene.settle(vllm)
    return vllm


def asked_for_what_is_there(scene, vllm, prompts, about, **params):
    """All of it is found and loaded, whatever the engine is doing."""
    vllm.reset()
    assert_loaded(prompts, scene.ask(vllm, prompts, about, **params))


@pytest.mark.parametrize("place", PLACES)
def test_an_engine_that_is_killed_costs_no_hit(scene, place):
    vllm = warmed(scene, LONG[:2], hasty=True)
    # One request that hits, one that is new: so that there are a load and a save.
    expected = scene.right(vllm.model, LONG[1:])
    if PLACES[place] is None:
        vllm.act("kill", pid=scene.engine.pid)
    else:
        vllm.hook(action="kill", pid=scene.engine.pid, **PLACES[place])
    assert_same(vllm.generate(LONG[1:], max_tokens=8, together=True), expected, "while it dies")
    assert vllm.calls()["hooks_left"] == 0, "the engine was not killed"
    assert scene.engine.state() == "dead"
    # vLLM goes on without it: only stores need an engine that lives.
    asked_for_what_is_there(scene, vllm, LONG[:2], "while it is dead")
    scene.ask(vllm, LONG[2:], "while it is dead")

    scene.engine.reap()
    scene.engine.start()
    asked_for_what_is_there(scene, vllm, LONG[:2], "after the restart")
    assert scene.engine.counters()["warm_start"] == 1
    scene.hits_are_back(vllm, LONG[2], "what could not be stored meanwhile")

    # Scheduler and worker have each said it once. (On a busy machine a beat may stand still as well.)
    said = transitions(vllm.log_since_ready())
    assert len(said) == 2, said
    for what in said.values():
        deaths = [at for at, line in enumerate(what) if "reason=its process has died" in line]
        assert len(deaths) == 1, said
        # The first connection may have been said after vLLM's start as well: nothing waits for the scheduler's.
        assert sum(line.startswith("connected to the kvring engine") for line in what[deaths[0] :]) == 1, said


def test_an_engine_may_be_killed_again_and_again(scene):
    """The engine dies ten times while requests go on."""
    vllm = warmed(scene, PROMPTS, hasty=True)
    for life in range(10):
        method, nth = [("start_load_kv", 2), ("wait_for_save", 3), ("build_connector_meta", 5)][life % 3]
        vllm.hook(action="kill", pid=scene.engine.pid, method=method, nth=nth)
        asked_for_what_is_there(scene, vllm, PROMPTS, f"life {life}", together=True)
        scene.engine.reap()
        scene.engine.start()
        asked_for_what_is_there(scene, vllm, PROMPTS, f"after life {life}")


def test_an_engine_that_is_restarted_ten_times_a_second_costs_no_hit(scene):
    """It is dead, or recovers, or serves and nobody has attached to it yet. So long as it lives so shortly, little is stored."""
    vllm = warmed(scene, PROMPTS, hasty=True)
    scene.right(vllm.model, PROMPTS)
    wrong, is_over = [], threading.Event()

    def restart():
        try:
            while not is_over.is_set():
                scene.engine.kill()
                scene.engine.start()
                time.sleep(0.05)
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        for turn in range(5):
            asked_for_what_is_there(scene, vllm, PROMPTS, f"turn {turn}")
            asked_for_what_is_there(scene, vllm, PROMPTS, f"turn {turn}, together", together=True)
    finally:
        is_over.set()
        thread.join()
    assert not wrong
    asked_for_what_is_there(scene, vllm, PROMPTS, "after all of that")


def test_an_engine_that_is_stopped_costs_no_hit_and_no_call_waits_for_it(scene):
    """SIGSTOP. `scene` checks the deadlines at the end."""
    vllm = warmed(scene, PROMPTS, hasty=True)
    scene.engine.pause()
    asked_for_what_is_there(scene, vllm, PROMPTS, "while it is stopped")
    asked_for_what_is_there(scene, vllm, PROMPTS, "while it is stopped, together", together=True)
    scene.ask(vllm, LONG[:1], "while it is stopped")
    scene.engine.resume()
    asked_for_what_is_there(scene, vllm, PROMPTS, "after it goes on")
    scene.hits_are_back(vllm, LONG[0], "what could not be stored meanwhile")


def test_an_engine_may_be_stopped_in_the_middle_of_a_step(scene):
    vllm = warmed(scene, LONG[:2], hasty=True)
    scene.right(vllm.model, LONG)
    for method in ("get_num_new_matched_tokens", "start_load_kv", "wait_for_save"):
        vllm.hook(action="stop", pid=scene.engine.pid, method=method)
        answers = scene.ask(vllm, LONG, f"stopped in {method}", together=True)
        assert_loaded(LONG[:2], answers[:2])
        scene.engine.resume()
        asked_for_what_is_there(scene, vllm, LONG[:2], f"after {method}")
        scene.settle(vllm)


def test_an_engine_that_comes_later_is_used(cold_scene):
    scene = cold_scene
    vllm = scene.vllm(kvring={"register_timeout_ms": 200})
    for about in ("cold", "still cold"):
        assert not any(answer["cached"] for answer in scene.ask(vllm, PROMPTS, about))
    scene.engine.start()
    scene.hits_are_back(vllm, PROMPTS[-1])
    vllm.generate(PROMPTS, max_tokens=8)
    scene.settle(vllm)
    assert_loaded(PROMPTS, scene.ask(vllm, PROMPTS, "with it"))


def test_a_long_silence_changes_nothing(scene):
    """vLLM says nothing for longer than any timeout of an engine that stalls: nobody is thrown out, the cache stays."""
    vllm = warmed(scene, PROMPTS, kvring={"stall_after_ms": 300})
    before = scene.engine.counters()
    scene.engine.lives_on(beats=240)
    assert scene.engine.counters()["clients"] == before["clients"]
    assert_loaded(PROMPTS, scene.ask(vllm, PROMPTS, "after the silence"))
    assert scene.engine.counters()["attaches"] == before["attaches"], "somebody had to attach again"


def test_a_vllm_that_stands_still_for_a_while_keeps_what_it_has(scene):
    """In the middle of a request (a debugger, a laptop that sleeps): its leases and its entry stay."""
    vllm = warmed(scene, LONG[:2], kvring={"stall_after_ms": 300})
    expected = scene.right(vllm.model, LONG)
    before = scene.engine.counters()
    names = vllm.add(LONG, max_tokens=8)
    vllm.step()
    actions.stop(vllm.pid)
    scene.engine.lives_on(beats=80)
    actions.resume(vllm.pid)
    vllm.finish()
    answers = vllm.take()
    assert_same([answers[name] for name in names], expected, "after standing still")
    assert scene.engine.counters()["attaches"] == before["attaches"]


def test_autostart_starts_an_engine_that_outlives_its_vllm_and_is_started_again_when_it_died(cold_scene):
    scene = cold_scene
    options = {"autostart": True, "arena": scene.engine.arena}
    first = warmed(scene, PROMPTS, kvring=options)
    first.close()
    assert scene.engine.state() == "serving"
    second = scene.vllm(kvring=options)
    assert_loaded(PROMPTS[-1:], scene.ask(second, PROMPTS, "the next vLLM")[-1:])

    scene.engine.kill()
    scene.ask(second, PROMPTS, "while there is none")
    scene.hits_are_back(second, PROMPTS[-1], "started again")
