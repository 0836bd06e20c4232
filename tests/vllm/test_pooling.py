"""Pooling models: `LAST` needs the last token's state only; a pooling of all tokens cannot begin in the middle of a prompt."""

import pytest
from real.compare import assert_found
from real.prompts import EDGES, prompt
from real.vllm import StepFailed, Vllm

POOLING = {"runner": "pooling", "convert": "embed"}


def test_the_last_tokens_state_is_what_it_is_without_kvring(scene):
    prompts = [prompt(length, length) for length in EDGES]
    vllm = scene.vllm(**POOLING)
    with Vllm(scene.zygote, vllm.model, **POOLING) as plain:
        expected = [answer["embedding"] for answer in plain.embed(prompts=prompts)]
    for about in ("cold", "warm"):
        answers = vllm.embed(prompts=prompts)
        for ask, answer, right in zip(prompts, answers, expected, strict=True):
            assert answer["embedding"] == pytest.approx(right, abs=1e-5), f"{about}: {len(ask)} tokens"
        scene.settle(vllm)
    assert_found(prompts, answers)


def test_a_mean_over_all_tokens_is_refused_at_start(scene):
    vllm = scene.vllm(**POOLING, pooler_config={"seq_pooling_type": "MEAN"}, max_num_batched_tokens=8192)
    with pytest.raises(StepFailed, match=r"kvring cannot be used with .*MEAN"):
        vllm.ready()
