"""Pooling models: `LAST` needs the last token's state only; a pooling of all tokens cannot begin in the middle of a prompt."""

import pytest
from real.prompts import BLOCK, EDGES, least_loadable, prompt
from real.vllm import StepFailed, Vllm

POOLING = {"runner": "pooling", "convert": "embed"}


def test_the_last_tokens_state_is_what_it_is_without_kvring(scene, llama):
    prompts = [prompt(length, length) for length in EDGES]
    with Vllm(scene.zygote, llama, **POOLING) as plain:
        expected = plain.embed(prompts=prompts)
    vllm = scene.vllm(**POOLING)
    for pass_ in ("cold", "warm"):
        answers = vllm.embed(prompts=prompts)
        for ask, answer, right in zip(prompts, answers, expected, strict=True):
            assert answer["embedding"] == pytest.approx(right["embedding"], abs=1e-5), f"{pass_}: {len(ask)} tokens"
            assert (answer["cached"] >= least_loadable(len(ask))) or pass_ == "cold", f"{len(ask)} tokens: {answer['cached']}"
        scene.settle(vllm)
    assert answers[-1]["cached"] >= BLOCK


def test_a_mean_over_all_tokens_is_refused_at_start(scene, llama):
    vllm = scene.vllm(**POOLING, pooler_config={"seq_pooling_type": "MEAN"}, max_num_batched_tokens=8192)
    with pytest.raises(StepFailed, match=r"kvring cannot be used with .*MEAN"):
        vllm.ready()
