"""The cache changes nothing: tokens and log-probabilities with it are those without it."""

import pytest
from real.compare import assert_same, differences
from real.prompts import BLOCK, EDGES, least_loadable, most_loadable, prompt, whole_blocks

OUTPUT = 16


def check_hits(prompts, answers):
    for ask, answer in zip(prompts, answers, strict=True):
        loaded, length = sum(answer["external"]), len(ask)
        assert least_loadable(length) <= loaded <= most_loadable(length), f"{length} tokens: {loaded} loaded"


@pytest.mark.no_engine
@pytest.mark.parametrize("prefix_caching", [False, True], ids=["alone", "prefix-caching"])
@pytest.mark.parametrize("load", ["async", "sync"])
@pytest.mark.parametrize("lookup", ["poll", "async"])
def test_cold_warm_and_the_next_turn(scene, baseline, llama, lookup, load, prefix_caching):
    prompts = [prompt(length, length) for length in EDGES]
    expected = baseline.answers(llama, prompts, max_tokens=OUTPUT)
    vllm = scene.vllm(kvring={"lookup": lookup, "load": load}, enable_prefix_caching=prefix_caching)

    cold = vllm.generate(prompts, max_tokens=OUTPUT)
    assert_same(cold, expected, "cold")
    assert not any(answer["cached"] for answer in cold)
    scene.settle(vllm)
    vllm.reset()

    warm = vllm.generate(prompts, max_tokens=OUTPUT)
    assert_same(warm, expected, "warm")
    check_hits(prompts, warm)
    assert not vllm.calls()["failed_blocks"]

    # Blocks that were filled by generated tokens are stored too. The last token was never computed.
    turn = [ask + answer["tokens"] for ask, answer in zip(prompts, expected, strict=True)]
    vllm.reset()
    scene.settle(vllm)
    expected = baseline.answers(llama, turn, max_tokens=4)
    answers = vllm.generate(turn, max_tokens=4)
    assert_same(answers, expected, "next turn")
    for ask, answer in zip(turn, answers, strict=True):
        assert sum(answer["external"]) >= whole_blocks(len(ask) - 1), f"{len(ask)} tokens: {answer['external']}"

    if prefix_caching:
        # What vLLM has itself is not loaded again; what it has only in part is completed.
        again = vllm.generate(turn, max_tokens=4)
        assert_same(again, expected, "from vLLM's own cache")
        assert not any(sum(answer["external"]) for answer in again)


@pytest.mark.no_engine
@pytest.mark.parametrize("load", ["async", "sync"])
def test_part_of_a_prefix_is_vllms_own(scene, baseline, llama, load):
    whole = prompt(77, 9 * BLOCK + 3)
    vllm = scene.vllm(kvring={"load": load}, enable_prefix_caching=True)
    expected = baseline.answers(llama, [whole[: 3 * BLOCK + 1], whole], max_tokens=8)
    vllm.generate([whole], max_tokens=8)
    scene.settle(vllm)
    vllm.reset()
    assert_same(vllm.generate([whole[: 3 * BLOCK + 1]], max_tokens=8), expected[:1], "the head")
    answer = vllm.generate([whole], max_tokens=8)
    assert_same(answer, expected[1:], "the whole")
    assert sum(answer[0]["external"]) == 6 * BLOCK, "three blocks were vLLM's own"
    assert answer[0]["cached"] == 9 * BLOCK


@pytest.mark.no_engine
@pytest.mark.parametrize("load", ["async", "sync"])
def test_several_requests_at_once(scene, baseline, llama, load):
    prompts = [prompt(500 + i, 40 + 37 * i) for i in range(8)]
    expected = baseline.answers(llama, prompts, max_tokens=OUTPUT)
    vllm = scene.vllm(kvring={"load": load})
    assert_same(vllm.generate(prompts, together=True, max_tokens=OUTPUT), expected, "cold")
    scene.settle(vllm)
    vllm.reset()
    warm = vllm.generate(prompts, together=True, max_tokens=OUTPUT)
    assert_same(warm, expected, "warm")
    check_hits(prompts, warm)


@pytest.mark.parametrize("chunk_blocks", [2, 4])
def test_chunks_of_several_blocks(scene, baseline, llama, chunk_blocks):
    prompts = [prompt(length, length) for length in EDGES]
    expected = baseline.answers(llama, prompts, max_tokens=OUTPUT)
    vllm = scene.vllm(kvring={"chunk_blocks": chunk_blocks})
    assert_same(vllm.generate(prompts, max_tokens=OUTPUT), expected, "cold")
    scene.settle(vllm)
    warm = vllm.generate(prompts, max_tokens=OUTPUT)
    assert_same(warm, expected, "warm")
    chunk = chunk_blocks * BLOCK
    for ask, answer in zip(prompts, warm, strict=True):
        assert (len(ask) - 1) // chunk * chunk <= sum(answer["external"]) <= len(ask) // chunk * chunk


def test_an_engine_core_of_its_own_process(scene, baseline, llama):
    prompts = [prompt(length, length) for length in EDGES]
    expected = baseline.answers(llama, prompts, max_tokens=OUTPUT)
    vllm = scene.vllm(environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    assert_same(vllm.generate(prompts, max_tokens=OUTPUT), expected, "cold")
    scene.settle(vllm)
    warm = vllm.generate(prompts, max_tokens=OUTPUT)
    assert_same(warm, expected, "warm")
    for ask, answer in zip(prompts, warm, strict=True):
        assert least_loadable(len(ask)) <= answer["cached"] <= most_loadable(len(ask))


@pytest.mark.no_engine
@pytest.mark.parametrize("load", ["async", "sync"])
def test_a_corrupted_load_is_noticed(scene, baseline, llama, load):
    """The test of these tests: bytes that change between two passes must not go unnoticed by the comparison."""
    prompts = [prompt(length, length) for length in EDGES if length > BLOCK]
    expected = baseline.answers(llama, prompts, max_tokens=OUTPUT)
    vllm = scene.vllm(kvring={"load": load, "checksum": "off"})
    vllm.generate(prompts, max_tokens=OUTPUT)
    scene.settle(vllm)
    vllm.reset()
    assert (vllm.act(action="spoil_standin") if scene.standin else scene.engine.spoil()) > 0
    spoilt = vllm.generate(prompts, max_tokens=OUTPUT)
    check_hits(prompts, spoilt)
    assert len(differences(spoilt, expected)) == len(prompts), "a corrupted load went unnoticed"


@pytest.mark.parametrize("load", ["async", "sync"])
def test_checksums_refuse_a_corrupted_load(scene, baseline, llama, load):
    prompts = [prompt(length, length) for length in EDGES]
    expected = baseline.answers(llama, prompts, max_tokens=OUTPUT)
    vllm = scene.vllm(kvring={"load": load, "checksum": "verify"})
    vllm.generate(prompts, max_tokens=OUTPUT)
    scene.settle(vllm)
    vllm.reset()
    assert_same(vllm.generate(prompts, max_tokens=OUTPUT), expected, "warm")
    assert not vllm.calls(clear=True)["failed_blocks"]
    assert scene.engine.spoil() > 0
    assert_same(vllm.generate(prompts, max_tokens=OUTPUT), expected, "spoilt and verified")
    assert vllm.calls()["failed_blocks"] > 0, "nothing failed"
