"""Bytes in the arena that are not those that were stored: whoever loads them first finds out, and nobody after that."""

import pytest
from real.compare import assert_same
from real.prompts import BLOCK, least_loadable, prompt


@pytest.mark.parametrize("policy", ["recompute", "fail"])
@pytest.mark.parametrize("load", ["async", "sync"])
def test_damaged_chunks_asked_for_again(scene, baseline, llama, load, policy):
    ask = prompt(43, 5 * BLOCK)
    expected = baseline.answers(llama, [ask], max_tokens=8)
    vllm = scene.vllm(kvring={"load": load, "checksum": "verify"}, policy=policy)
    assert_same(vllm.generate([ask], max_tokens=8), expected, "cold")
    scene.settle(vllm)
    assert scene.engine.spoil() > 0
    first = vllm.generate([ask], max_tokens=8)
    if policy == "fail":
        # vLLM's own default: the request that finds it out pays for it.
        assert (first[0]["finish_reason"], first[0]["tokens"]) == ("error", [])
    else:
        assert_same(first, expected, "the first one that loads it")
    assert vllm.calls(clear=True)["failed_blocks"] > 0
    scene.settle(vllm)
    assert scene.engine.counters()["chunks_invalidated"] > 0
    # From now on nobody is sent there: what is missing is computed and stored again.
    assert_same(vllm.generate([ask], max_tokens=8), expected, "the second one")
    scene.settle(vllm)
    third = vllm.generate([ask], max_tokens=8)
    assert_same(third, expected, "the third one")
    assert sum(third[0]["external"]) >= least_loadable(len(ask)), third
    assert not vllm.calls()["failed_blocks"], "damaged bytes were loaded again"
