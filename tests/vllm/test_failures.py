"""Loads that fail, requests that are aborted, caches that are reset."""

import pytest
from real.compare import assert_same
from real.prompts import BLOCK, EDGES, least_loadable, prompt
from real.scenarios import poisoning


@pytest.mark.parametrize("load", ["async", "sync"])
def test_a_failed_load_is_computed_again_and_poisons_nothing(scene, load):
    vllm = scene.vllm(kvring={"load": load}, broken=("first_load_fails",))
    poisoning(scene, vllm, seed=35)
    assert vllm.calls()["failed_blocks"] > 0


@pytest.mark.parametrize("load", ["async", "sync"])
def test_no_load_ever_succeeds(scene, baseline, llama, load):
    prompts = [prompt(length, length) for length in EDGES]
    expected = baseline.answers(llama, prompts, max_tokens=16)
    vllm = scene.vllm(kvring={"load": load}, broken=("every_load_fails",))
    for pass_ in ("cold", "warm", "once more"):
        assert_same(vllm.generate(prompts, max_tokens=16), expected, pass_)
        assert_same(vllm.generate(prompts, max_tokens=16, together=True), expected, f"{pass_}, together")
        scene.settle(vllm)


@pytest.mark.parametrize("load", ["async", "sync"])
def test_with_the_policy_to_fail_the_request_ends_with_an_error(scene, baseline, llama, load):
    ask = prompt(41, 5 * BLOCK)
    expected = baseline.answers(llama, [ask], max_tokens=8)
    vllm = scene.vllm(kvring={"load": load}, policy="fail", broken=("first_load_fails",))
    assert_same(vllm.generate([ask], max_tokens=8), expected, "cold")
    scene.settle(vllm)
    failed = vllm.generate([ask], max_tokens=8)[0]
    assert failed["finish_reason"] == "error", failed["finish_reason"]
    assert failed["tokens"] == []
    # Nobody else pays for it, and the next one is served.
    answer = vllm.generate([ask], max_tokens=8)
    assert_same(answer, expected, "after the failed one")
    assert sum(answer[0]["external"]) >= least_loadable(len(ask))


@pytest.mark.parametrize("lookup", ["poll", "async"])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_abort_around_a_load(scene, baseline, llama, lookup, steps):
    """Aborted before its lookup, in the step that starts its load, or after: blocks, leases and sessions are given back."""
    asks = [prompt(51, 4096), prompt(52, 4096)]
    expected = baseline.answers(llama, asks, max_tokens=4)
    vllm = scene.vllm(kvring={"lookup": lookup})
    assert_same(vllm.generate(asks, max_tokens=4), expected, "cold")
    scene.settle(vllm)
    names = vllm.add(asks, max_tokens=4)
    vllm.step(times=steps)
    vllm.abort(names=names[:1])
    vllm.finish()
    assert_same([vllm.take()[names[1]]], expected[1:], "the one that was not aborted")
    # The cache has not suffered, and nothing is left: `scene` checks that at the end.
    assert_same(vllm.generate(asks, max_tokens=4), expected, "after the abort")


def test_an_abort_while_a_copy_runs(scene, baseline, llama):
    """As above, but aborted from within the call that starts the load: no step lies in between."""
    ask = prompt(53, 4096)
    expected = baseline.answers(llama, [ask], max_tokens=4)
    vllm = scene.vllm()
    vllm.generate([ask], max_tokens=4)
    scene.settle(vllm)
    for _ in range(5):
        names = vllm.add([ask], max_tokens=4)
        vllm.step()
        vllm.abort(names=names)
        answer = vllm.generate([ask], max_tokens=4)
        assert_same(answer, expected, "after an abort")
        assert sum(answer[0]["external"]) >= least_loadable(len(ask))


def test_reset_prefix_cache_resets_the_connector_on_demand(scene, baseline, llama):
    asks = [prompt(length, length) for length in EDGES]
    expected = baseline.answers(llama, asks, max_tokens=8)
    vllm = scene.vllm(enable_prefix_caching=True)
    vllm.generate(asks, max_tokens=8)
    scene.settle(vllm)
    assert vllm.reset(connector=False)
    warm = vllm.generate(asks, max_tokens=8)
    assert any(sum(answer["external"]) for answer in warm)

    assert vllm.reset(connector=True), "vLLM was told that the reset failed"
    cold = vllm.generate(asks, max_tokens=8)
    assert_same(cold, expected, "after a reset")
    assert not any(answer["cached"] for answer in cold), "hits after a reset"
    scene.settle(vllm)
    vllm.reset()
    warm = vllm.generate(asks, max_tokens=8)
    assert_same(warm, expected, "and warm again")
    assert all(sum(answer["external"]) >= least_loadable(len(ask)) for ask, answer in zip(asks, warm, strict=True))


def test_salts_keep_requests_apart(scene, baseline, llama):
    asks = [prompt(length, length) for length in (64, 321)]
    expected = baseline.answers(llama, asks, max_tokens=8)
    vllm = scene.vllm()
    for salt in ("one", "two", None):
        first = vllm.generate(asks, max_tokens=8, salt=salt)
        assert_same(first, expected, f"salt {salt}, first")
        assert not any(answer["cached"] for answer in first), f"salt {salt} hit what another one stored"
        scene.settle(vllm)
    for salt in ("one", "two", None):
        again = vllm.generate(asks, max_tokens=8, salt=salt)
        assert_same(again, expected, f"salt {salt}, again")
        assert all(answer["cached"] for answer in again)
