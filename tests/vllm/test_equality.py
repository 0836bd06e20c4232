"""The cache changes nothing: tokens and log-probabilities with it are those without it."""

import pytest
from real.compare import assert_found, assert_loaded, differences
from real.prompts import BLOCK, EDGES, prompt
from real.scenarios import TWO_RANKS, next_turn

PROMPTS = [prompt(length, length) for length in EDGES]
OUTPUT = 16
LOADS = pytest.mark.parametrize("load", ["async", "sync"])


@pytest.mark.parametrize("prefix_caching", [False, True], ids=["alone", "prefix-caching"])
@LOADS
def test_cold_warm_and_the_next_turn_are_answered_alike(scene, load, prefix_caching):
    vllm = scene.vllm(kvring={"load": load}, enable_prefix_caching=prefix_caching)
    scene.cold_and_warm(vllm, PROMPTS)
    assert not vllm.calls()["failed_blocks"]

    # Blocks that were filled by generated tokens are stored too. The last token was never computed.
    turn = next_turn(scene, vllm, PROMPTS, OUTPUT, left=0)
    vllm.reset()
    scene.settle(vllm)
    assert_loaded(turn, scene.ask(vllm, turn, "next turn", max_tokens=4))

    if prefix_caching:
        again = scene.ask(vllm, turn, "from vLLM's own cache", max_tokens=4)
        assert not any(sum(answer["external"]) for answer in again), "what vLLM has itself was loaded again"


@LOADS
def test_what_vllm_has_of_a_prefix_is_completed(scene, load):
    whole = prompt(77, 9 * BLOCK + 3)
    vllm = scene.vllm(kvring={"load": load}, enable_prefix_caching=True)
    vllm.generate([whole], max_tokens=8)
    scene.settle(vllm)
    vllm.reset()
    scene.ask(vllm, [whole[: 3 * BLOCK + 1]], "the head")
    (answer,) = scene.ask(vllm, [whole], "the whole")
    assert sum(answer["external"]) == 6 * BLOCK, "three blocks were vLLM's own"
    assert answer["cached"] == 9 * BLOCK


@LOADS
def test_several_requests_at_once_are_answered_alike(scene, load):
    prompts = [prompt(500 + i, 40 + 37 * i) for i in range(8)]
    scene.cold_and_warm(scene.vllm(kvring={"load": load}), prompts, together=True)


@pytest.mark.parametrize("chunk_blocks", [2, 4])
def test_chunks_of_several_blocks_are_found_whole(scene, chunk_blocks):
    vllm = scene.vllm(kvring={"chunk_blocks": chunk_blocks})
    scene.ask(vllm, PROMPTS, "cold", max_tokens=OUTPUT)
    scene.settle(vllm)
    chunk = chunk_blocks * BLOCK
    for ask, answer in zip(PROMPTS, scene.ask(vllm, PROMPTS, "warm", max_tokens=OUTPUT), strict=True):
        assert (len(ask) - 1) // chunk * chunk <= sum(answer["external"]) <= len(ask) // chunk * chunk


@LOADS
def test_two_ranks_of_which_each_has_its_half_answer_alike(scene, load):
    """A chunk is found only when both ranks have stored their halves."""
    scene.cold_and_warm(scene.vllm(kvring={"load": load}, **TWO_RANKS), PROMPTS)


def test_an_engine_core_in_a_process_of_its_own_answers_alike(scene):
    vllm = scene.vllm(environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    scene.ask(vllm, PROMPTS, "cold", max_tokens=OUTPUT)
    scene.settle(vllm)
    assert_found(PROMPTS, scene.ask(vllm, PROMPTS, "warm", max_tokens=OUTPUT))


@LOADS
def test_a_corrupted_load_is_noticed(scene, load):
    """The test of these tests: bytes that change between two passes must not go unnoticed by the comparison."""
    prompts = [ask for ask in PROMPTS if len(ask) > BLOCK]
    vllm = scene.vllm(kvring={"load": load, "checksum": "off"})
    vllm.generate(prompts, max_tokens=OUTPUT)
    scene.settle(vllm)
    vllm.reset()
    assert scene.engine.spoil() > 0
    spoilt = vllm.generate(prompts, max_tokens=OUTPUT)
    assert_loaded(prompts, spoilt)
    assert len(differences(spoilt, scene.right(vllm.model, prompts, OUTPUT))) == len(prompts), "a corrupted load went unnoticed"


@LOADS
def test_checksums_refuse_a_corrupted_load(scene, load):
    vllm = scene.vllm(kvring={"load": load, "checksum": "verify"})
    vllm.generate(PROMPTS, max_tokens=OUTPUT)
    scene.settle(vllm)
    vllm.reset()
    scene.ask(vllm, PROMPTS, "warm", max_tokens=OUTPUT)
    assert not vllm.calls(clear=True)["failed_blocks"]
    assert scene.engine.spoil() > 0
    scene.ask(vllm, PROMPTS, "spoilt and verified", max_tokens=OUTPUT)
    assert vllm.calls()["failed_blocks"] > 0, "nothing failed"


@pytest.mark.parametrize("policy", ["recompute", "fail"])
@LOADS
def test_damaged_chunks_fail_once_and_are_stored_again(scene, load, policy):
    """The first request that loads them finds out, and no other one after that."""
    ask = prompt(43, 5 * BLOCK)
    vllm = scene.vllm(kvring={"load": load, "checksum": "verify"}, policy=policy)
    scene.ask(vllm, [ask], "cold")
    scene.settle(vllm)
    assert scene.engine.spoil() > 0
    if policy == "fail":
        # vLLM's own default: the request that finds it out pays for it.
        (first,) = vllm.generate([ask], max_tokens=8)
        assert (first["finish_reason"], first["tokens"]) == ("error", [])
    else:
        scene.ask(vllm, [ask], "the first one that loads it")
    assert vllm.calls(clear=True)["failed_blocks"] > 0
    assert scene.settle(vllm)["chunks_invalidated"] > 0
    scene.ask(vllm, [ask], "the second one")
    scene.settle(vllm)
    assert_loaded([ask], scene.ask(vllm, [ask], "the third one"))
    assert not vllm.calls()["failed_blocks"], "damaged bytes were loaded again"
