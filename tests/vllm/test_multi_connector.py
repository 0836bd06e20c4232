"""kvring beside other connectors, in vLLM's `MultiConnector`."""

import pytest
from real.compare import assert_same
from real.prompts import BLOCK, EDGES, least_loadable, prompt, whole_blocks

PROMPTS = [prompt(length, length) for length in EDGES if length <= 1024]
"""Each prefilled in one step: vLLM's example stores a prompt in the first one that it has, whatever of it has been computed."""


def example(tmp_path) -> dict:
    """vLLM's own: whole prompts in files, loaded synchronously."""
    extra = {"shared_storage_path": str(tmp_path / "example")}
    return {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def beside(other: dict, first: str) -> tuple[list[dict], list[dict]]:
    return ([], [other]) if first == "kvring" else ([other], [])


@pytest.mark.parametrize("load", ["async", "sync"])
@pytest.mark.parametrize("first", ["kvring", "example"])
def test_beside_a_connector_that_loads_synchronously(scene, baseline, llama, tmp_path, first, load):
    expected = baseline.answers(llama, PROMPTS, max_tokens=8)
    vllm = scene.vllm(beside=beside(example(tmp_path), first), kvring={"load": load})
    assert_same(vllm.generate(PROMPTS, max_tokens=8), expected, "cold")
    scene.settle(vllm)
    for pass_ in ("warm", "warm, all at once"):
        vllm.reset()
        warm = vllm.generate(PROMPTS, together=pass_ != "warm", max_tokens=8)
        assert_same(warm, expected, pass_)
        for ask, answer in zip(PROMPTS, warm, strict=True):
            # The example leaves the last two tokens out.
            least = least_loadable(len(ask) - (first == "example"))
            assert answer["cached"] >= least, f"{len(ask)} tokens: {answer['cached']}"
        scene.settle(vllm)
    assert ("Inject KV cache" in vllm.log_since_ready()) == (first == "example")

    # The example knows whole prompts only: this is kvring's.
    turn = [ask + answer["tokens"] for ask, answer in zip(PROMPTS, expected, strict=True)]
    vllm.reset()
    expected = baseline.answers(llama, turn, max_tokens=4)
    answers = vllm.generate(turn, max_tokens=4)
    assert_same(answers, expected, "next turn")
    for ask, answer in zip(turn, answers, strict=True):
        assert answer["cached"] >= whole_blocks(len(ask) - 9), f"{len(ask)} tokens: {answer['cached']}"


@pytest.mark.parametrize("first", ["kvring", "example"])
def test_aborts_leave_nothing_behind_and_nothing_wrong(scene, baseline, llama, tmp_path, first):
    expected = baseline.answers(llama, PROMPTS, max_tokens=8)
    vllm = scene.vllm(beside=beside(example(tmp_path), first))
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
    assert_same(vllm.generate(PROMPTS, max_tokens=8), expected, "afterwards")


def test_statistics_of_several_connectors_are_counted(scene, baseline, llama, tmp_path):
    """Each step's statistics come to the front end by the connector's name; an error there ends all requests."""
    expected = baseline.answers(llama, PROMPTS, max_tokens=8)
    vllm = scene.vllm(
        beside=beside(example(tmp_path), "kvring"),
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        disable_log_stats=False,
    )
    for pass_ in ("cold", "warm"):
        assert_same(vllm.generate(PROMPTS, max_tokens=8), expected, pass_)
        scene.settle(vllm)
    asked = [ask for ask in PROMPTS if len(ask) >= BLOCK]
    assert vllm.act(action="metric", name="vllm:kvring_lookups") == 2 * len(asked)
    assert vllm.act(action="metric", name="vllm:kvring_hit_tokens") == sum(whole_blocks(len(ask)) for ask in asked)


def test_what_another_connector_could_not_load_is_not_stored(scene, baseline, llama):
    """It has a prompt's head, loads it synchronously, and fails: the step computes garbage from it."""
    whole = prompt(7700, 10 * BLOCK + 5)
    head = whole[: 4 * BLOCK + 1]
    expected = baseline.answers(llama, [head, whole], max_tokens=8)
    other = {
        "kv_connector": "StandIn",
        "kv_connector_module_path": "real.standin",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"load": "sync", "fail": True},
    }
    vllm, later = scene.vllm(beside=([other], [])), scene.vllm()
    assert_same(vllm.generate([head], max_tokens=8), expected[:1], "the head")
    scene.settle(vllm)
    vllm.reset()
    assert_same(vllm.generate([whole], max_tokens=8), expected[1:], "with a failed load")
    assert vllm.calls()["failed_blocks"] == 4, "no load has failed: this test tests nothing"
    scene.settle(vllm)
    again = later.generate([whole], max_tokens=8)
    assert again[0]["cached"] >= whole_blocks(len(head)), "nothing was stored"
    assert_same(again, expected[1:], "from what was stored meanwhile")
