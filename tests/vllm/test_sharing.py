"""Several vLLMs on one engine."""

from real.compare import assert_loaded, assert_same
from real.models import model
from real.prompts import EDGES, prompt

PROMPTS = [prompt(length, length) for length in EDGES]


def test_a_second_vllm_hits_what_the_first_stored(scene):
    first, second = scene.vllm(), scene.vllm()
    scene.ask(first, PROMPTS, "the first")
    scene.settle(first)
    first.close()
    assert_loaded(PROMPTS, scene.ask(second, PROMPTS, "the second"))


def test_a_vllm_that_is_killed_leaves_no_lease_and_no_wrong_bytes(scene):
    first, second = scene.vllm(), scene.vllm()
    first.generate(PROMPTS[:5], max_tokens=8)
    first.add(PROMPTS, max_tokens=8)
    first.step(times=2)
    first.kill()
    for about in ("cold", "warm"):
        scene.ask(second, PROMPTS, about)
        scene.settle(second)


def test_two_models_side_by_side_never_get_each_others_kv(scene):
    """The same architecture, prompts and hashes, other weights."""
    vllms = [scene.vllm(), scene.vllm(model("llama", seed=1))]
    for vllm in vllms:
        cold = scene.ask(vllm, PROMPTS, "cold")
        assert not any(answer["cached"] for answer in cold), "a model hit what another one stored"
        scene.settle(vllm)
    for vllm in vllms:
        assert any(answer["cached"] for answer in scene.ask(vllm, PROMPTS, "warm"))


def test_two_vllms_may_store_and_load_the_same_prefixes_at_once(scene):
    prompts = [prompt(600 + i % 4, 64 + 32 * i) for i in range(12)]
    vllms = [scene.vllm(), scene.vllm()]
    expected = scene.right(vllms[0].model, prompts)
    for number in range(3):
        for vllm in vllms:
            vllm.ready()
            vllm.send({"do": "generate", "prompts": prompts, "max_tokens": 8})
        for vllm in vllms:
            assert_same(vllm.receive(), expected, f"pass {number}")
