"""The suite notices mistakes that were seen elsewhere: connectors that make them do not pass it."""

import pytest
from real.scenarios import minimal_preemption, poisoning
from test_tensor_parallel import TWO_RANKS


@pytest.mark.parametrize("lookup", ["poll", "async"])
def test_a_lookup_of_the_prompt_only(scene, lookup):
    with pytest.raises(AssertionError, match=r"resumed with|no resumed request"):
        minimal_preemption(scene, broken=("prompt_only_lookup",), kvring={"lookup": lookup})


def test_a_lookup_that_is_consumed(scene):
    with pytest.raises(AssertionError, match="changed within an admission"):
        minimal_preemption(scene, broken=("consumed_lookup",))


def test_appended_block_ids(scene):
    with pytest.raises(AssertionError, match="second pass"):
        minimal_preemption(scene, broken=("appended_block_ids",))


def test_a_failed_synchronous_load_that_is_ignored(scene):
    vllm = scene.vllm(kvring={"load": "sync"}, broken=("first_load_fails", "stores_after_a_failed_load"))
    with pytest.raises(AssertionError, match="after a failed load"):
        poisoning(scene, vllm, seed=31)


def test_one_ranks_failed_synchronous_load_that_is_ignored(scene):
    broken = ("first_load_of_rank_one_fails", "stores_after_a_failed_load")
    vllm = scene.vllm(kvring={"load": "sync"}, broken=broken, **TWO_RANKS)
    with pytest.raises(AssertionError, match="after a failed load"):
        poisoning(scene, vllm, seed=32)


def test_stores_that_are_read_late_and_not_flushed(scene):
    with pytest.raises(AssertionError, match=r"under preemption|second pass"):
        minimal_preemption(scene, broken=("stores_late_without_fences",))
