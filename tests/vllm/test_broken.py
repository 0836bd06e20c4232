"""The suite notices mistakes that were seen elsewhere: connectors that make them do not pass it."""

import pytest
from real.scenarios import TWO_RANKS, minimal_preemption, poisoning


@pytest.mark.parametrize(
    ("broken", "caught"),
    [
        ("prompt_only_lookup", r"resumed with|no resumed request"),
        ("consumed_lookup", "changed within an admission"),
        ("appended_block_ids", "second pass"),
        ("stores_late_without_fences", r"under preemption|second pass"),
    ],
)
def test_a_mistake_is_caught_when_vllm_preempts(scene, broken, caught):
    with pytest.raises(AssertionError, match=caught):
        minimal_preemption(scene, broken=(broken,))


@pytest.mark.parametrize(
    ("failure", "options", "seed"), [("first_load_fails", {}, 31), ("first_load_of_rank_one_fails", TWO_RANKS, 32)]
)
def test_a_failed_synchronous_load_that_is_ignored_is_caught(scene, failure, options, seed):
    vllm = scene.vllm(kvring={"load": "sync"}, broken=(failure, "stores_after_a_failed_load"), **options)
    with pytest.raises(AssertionError, match="after a failed load"):
        poisoning(scene, vllm, seed)
