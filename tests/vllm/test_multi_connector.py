"""kvring beside other connectors, in vLLM's `MultiConnector`."""

import pytest
from real.compare import assert_found, assert_same
from real.prompts import BLOCK, EDGES, prompt, whole_blocks
from real.scenarios import next_turn

PROMPTS = [prompt(length, length) for length in EDGES if length <= 1024]
"""Each prefilled in one step: vLLM's example stores a prompt in the first one that it has, whatever of it has been computed."""

FIRST = pytest.mark.parametrize("first", ["kvring", "example"])


def beside_example(tmp_path, first: str) -> tuple[list[dict], list[dict]]:
    """vLLM's own example before kvring or behind it: whole prompts in files, loaded synchronously."""
    extra = {"shared_storage_path": str(tmp_path / "example")}
    example = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return ([], [example]) if first == "kvring" else ([example], [])


@pytest.mark.parametrize("load", ["async", "sync"])
@FIRST
def test_beside_a_connector_that_loads_synchronously_all_is_found_and_right(scene, tmp_path, first, load):
    vllm = scene.vllm(beside=beside_example(tmp_path, first), kvring={"load": load})
    scene.ask(vllm, PROMPTS, "cold")
    scene.settle(vllm)
    for together in (False, True):
        vllm.reset()
        warm = scene.ask(vllm, PROMPTS, f"warm, together: {together}", together=together)
        # The example leaves the last two tokens out.
        assert_found(PROMPTS, warm, less=int(first == "example"))
        scene.settle(vllm)
    assert ("Inject KV cache" in vllm.log_since_ready()) == (first == "example")

    # The example knows whole prompts only: this is kvring's.
    turn = next_turn(scene, vllm, PROMPTS, 8, left=0)
    vllm.reset()
    assert_found(turn, scene.ask(vllm, turn, "next turn", max_tokens=4), less=8)


@FIRST
def test_aborts_leave_nothing_behind_and_nothing_wrong(scene, tmp_path, first):
    vllm = scene.vllm(beside=beside_example(tmp_path, first))
    expected = scene.right(vllm.model, PROMPTS)
    for steps in (1, 2, 4):
        # The aborts meet loads, computation and stores: the second round finds what the first has stored.
        names = vllm.add(PROMPTS, max_tokens=8)
        vllm.step(steps)
        vllm.abort(names[::2])
        vllm.finish()
        answers = vllm.take()
        assert_same([answers[name] for name in names[1::2]], expected[1::2], f"aborted after {steps} steps")
        scene.settle(vllm)
        vllm.reset()
    scene.ask(vllm, PROMPTS, "afterwards")


def test_statistics_of_several_connectors_are_counted(scene, tmp_path):
    """Each step's statistics come to the front end by the connector's name; an error there ends all requests."""
    vllm = scene.vllm(
        beside=beside_example(tmp_path, "kvring"),
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        disable_log_stats=False,
    )
    for about in ("cold", "warm"):
        scene.ask(vllm, PROMPTS, about)
        scene.settle(vllm)
    asked = [ask for ask in PROMPTS if len(ask) >= BLOCK]
    assert vllm.act("metric", name="vllm:kvring_lookups") == 2 * len(asked)
    assert vllm.act("metric", name="vllm:kvring_hit_tokens") == sum(whole_blocks(len(ask)) for ask in asked)


def test_what_another_connector_could_not_load_is_not_stored(scene):
    """It has a prompt's head, loads it synchronously, and fails: the step computes garbage from it."""
    whole = prompt(7700, 10 * BLOCK + 5)
    head = whole[: 4 * BLOCK + 1]
    other = {
        "kv_connector": "ToyConnector",
        "kv_connector_module_path": "harness.toy",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"toy.load": "sync", "toy.loads_fail": True},
    }
    vllm, later = scene.vllm(beside=([other], [])), scene.vllm()
    scene.ask(vllm, [head], "the head")
    scene.settle(vllm)
    vllm.reset()
    scene.ask(vllm, [whole], "with a failed load")
    assert vllm.calls()["failed_blocks"] == 4, "no load has failed: this test tests nothing"
    scene.settle(vllm)
    (again,) = scene.ask(later, [whole], "from what was stored meanwhile")
    assert again["cached"] >= whole_blocks(len(head)), "nothing was stored"
