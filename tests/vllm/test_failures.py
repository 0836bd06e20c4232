"""Loads that fail, requests that are aborted, caches that are reset."""

import pytest
from real.compare import assert_loaded, assert_same
from real.prompts import BLOCK, EDGES, prompt
from real.scenarios import TWO_RANKS, poisoning

PROMPTS = [prompt(length, length) for length in EDGES]
LOADS = pytest.mark.parametrize("load", ["async", "sync"])


@pytest.mark.parametrize("ranks", [1, 2])
@LOADS
def test_a_failed_load_is_computed_again_and_poisons_nothing(scene, load, ranks):
    """The load fails on the only rank, or on one of two."""
    broken, options = ("first_load_fails", {}) if ranks == 1 else ("first_load_of_rank_one_fails", TWO_RANKS)
    vllm = scene.vllm(kvring={"load": load}, broken=(broken,), **options)
    poisoning(scene, vllm, seed=35)
    assert vllm.calls()["failed_blocks"] > 0 or ranks == 2, "nothing failed here, and no other process has a rank"


@LOADS
def test_where_no_load_ever_succeeds_all_is_computed(scene, load):
    vllm = scene.vllm(kvring={"load": load}, broken=("every_load_fails",))
    for about in ("cold", "warm", "once more"):
        scene.ask(vllm, PROMPTS, about, max_tokens=16)
        scene.ask(vllm, PROMPTS, f"{about}, together", max_tokens=16, together=True)
        scene.settle(vllm)


@LOADS
def test_with_the_policy_to_fail_only_the_request_whose_load_fails_ends_with_an_error(scene, load):
    ask = prompt(41, 5 * BLOCK)
    vllm = scene.vllm(kvring={"load": load}, policy="fail", broken=("first_load_fails",))
    scene.ask(vllm, [ask], "cold")
    scene.settle(vllm)
    (failed,) = vllm.generate([ask], max_tokens=8)
    assert (failed["finish_reason"], failed["tokens"]) == ("error", [])
    assert_loaded([ask], scene.ask(vllm, [ask], "after the failed one"))


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_abort_around_a_load_costs_nobody_else_anything(scene, steps):
    """Aborted before its lookup, in the step that starts its load, or after: blocks, leases and sessions are given back, as
    `scene` checks at the end."""
    asks = [prompt(51, 4096), prompt(52, 4096)]
    vllm = scene.vllm()
    scene.ask(vllm, asks, "cold", max_tokens=4)
    scene.settle(vllm)
    names = vllm.add(asks, max_tokens=4)
    vllm.step(times=steps)
    vllm.abort(names=names[:1])
    vllm.finish()
    assert_same([vllm.take()[names[1]]], scene.right(vllm.model, asks[1:], 4), "the one that was not aborted")
    scene.ask(vllm, asks, "after the abort", max_tokens=4)


def test_an_abort_while_a_copy_runs_costs_nothing(scene):
    """As above, but again and again, each time right after the step that starts the load."""
    ask = prompt(53, 4096)
    vllm = scene.vllm()
    vllm.generate([ask], max_tokens=4)
    scene.settle(vllm)
    for _ in range(5):
        names = vllm.add([ask], max_tokens=4)
        vllm.step()
        vllm.abort(names=names)
        assert_loaded([ask], scene.ask(vllm, [ask], "after an abort", max_tokens=4))


def test_reset_prefix_cache_resets_the_connector_on_demand(scene):
    vllm = scene.vllm(enable_prefix_caching=True)
    vllm.generate(PROMPTS, max_tokens=8)
    scene.settle(vllm)
    assert vllm.reset(connector=False)
    assert any(sum(answer["external"]) for answer in vllm.generate(PROMPTS, max_tokens=8))

    assert vllm.reset(connector=True), "vLLM was told that the reset failed"
    scene.cold_and_warm(vllm, PROMPTS, max_tokens=8)


def test_salts_keep_requests_apart(scene):
    asks = [prompt(length, length) for length in (64, 321)]
    vllm = scene.vllm()
    for salt in ("one", "two", None):
        first = scene.ask(vllm, asks, f"salt {salt}, first", salt=salt)
        assert not any(answer["cached"] for answer in first), f"salt {salt} hit what another one stored"
        scene.settle(vllm)
    for salt in ("one", "two", None):
        again = scene.ask(vllm, asks, f"salt {salt}, again", salt=salt)
        assert all(answer["cached"] for answer in again)
