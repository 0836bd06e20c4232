"""Several vLLMs on one engine."""

from real.compare import assert_same
from real.models import model
from real.prompts import EDGES, least_loadable, prompt

PROMPTS = [prompt(length, length) for length in EDGES]


def test_a_second_vllm_hits_what_the_first_stored(scene, baseline, llama):
    expected = baseline.answers(llama, PROMPTS, max_tokens=8)
    first, second = scene.vllm(), scene.vllm()
    assert_same(first.generate(PROMPTS, max_tokens=8), expected, "the first")
    scene.settle(first)
    first.close()
    answers = second.generate(PROMPTS, max_tokens=8)
    assert_same(answers, expected, "the second")
    for ask, answer in zip(PROMPTS, answers, strict=True):
        assert sum(answer["external"]) >= least_loadable(len(ask)), f"{len(ask)} tokens: {answer['external']}"


def test_a_vllm_that_is_killed_leaves_no_lease_and_no_wrong_bytes(scene, baseline, llama):
    expected = baseline.answers(llama, PROMPTS, max_tokens=8)
    first, second = scene.vllm(), scene.vllm()
    first.generate(PROMPTS[:5], max_tokens=8)
    first.add(PROMPTS, max_tokens=8)
    first.step(times=2)
    first.kill()
    for pass_ in ("cold", "warm"):
        assert_same(second.generate(PROMPTS, max_tokens=8), expected, pass_)
        scene.settle(second)


def test_two_models_side_by_side(scene, baseline, llama):
    """The same architecture, prompts and hashes, other weights: never each other's KV."""
    other = model("llama", seed=1)
    expected = {name: baseline.answers(name, PROMPTS, max_tokens=8) for name in (llama, other)}
    vllms = {name: scene.vllm(name) for name in (llama, other)}
    for name, vllm in vllms.items():
        cold = vllm.generate(PROMPTS, max_tokens=8)
        assert_same(cold, expected[name], "cold")
        assert not any(answer["cached"] for answer in cold), "a model hit what another one stored"
        scene.settle(vllm)
    for name, vllm in vllms.items():
        warm = vllm.generate(PROMPTS, max_tokens=8)
        assert_same(warm, expected[name], "warm")
        assert any(answer["cached"] for answer in warm)


def test_two_vllms_at_once(scene, baseline, llama):
    """Both store and load the same prefixes at the same time."""
    prompts = [prompt(600 + i % 4, 64 + 32 * i) for i in range(12)]
    expected = baseline.answers(llama, prompts, max_tokens=8)
    vllms = [scene.vllm(), scene.vllm()]
    for pass_ in range(3):
        for vllm in vllms:
            vllm.ready()
            vllm.send({"do": "generate", "prompts": prompts, "max_tokens": 8})
        for vllm in vllms:
            assert_same(vllm.receive(), expected, f"pass {pass_}")
