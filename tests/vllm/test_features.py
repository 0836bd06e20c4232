"""Features of vLLM beyond plain answers, each compared with the same vLLM without a connector."""

import re

from real.compare import TOLERANCE, assert_same
from real.models import spoken
from real.prompts import BLOCK, least_loadable, prompt, whole_blocks
from real.vllm import Vllm

LENGTHS = (31, 33, 100, 321)
PROMPTS = [prompt(7000 + length, length) for length in LENGTHS]


def found_all(prompts, answers):
    for ask, answer in zip(prompts, answers, strict=True):
        assert answer["cached"] >= least_loadable(len(ask)), f"{answer['cached']} of {len(ask)} tokens were found"


def test_several_answers_to_one_prompt(scene, zygote, llama):
    """`n` > 1: as many requests of one prompt at once. Each draws its own tokens, and loads or shares the same blocks."""
    sampled = {"n": 3, "temperature": 2.0, "seed": 5, "max_tokens": 8}
    with Vllm(zygote, llama) as plain:
        expected = plain.generate(PROMPTS, **sampled)
    assert all(len({tuple(choice) for choice in answer["choices"]}) == 3 for answer in expected), expected
    vllm = scene.vllm()
    for pass_ in ("cold", "warm"):
        answers = vllm.generate(PROMPTS, **sampled)
        assert [a["choices"] for a in answers] == [e["choices"] for e in expected], pass_
        scene.settle(vllm)
    found_all(PROMPTS, answers)


def test_log_probabilities_of_a_prompt(scene, zygote, llama):
    """vLLM computes the whole prompt for them, whatever is cached; and what it computes is stored."""
    told = {"prompt_logprobs": 3, "max_tokens": 4}
    with Vllm(zygote, llama) as plain:
        expected = plain.generate(PROMPTS, **told)
    vllm = scene.vllm()
    for pass_ in ("cold", "warm"):
        answers = vllm.generate(PROMPTS, **told)
        assert_same(answers, expected, pass_)
        for answer, right in zip(answers, expected, strict=True):
            ours, theirs = answer["prompt_logprobs"], right["prompt_logprobs"]
            assert len(ours) == len(theirs) and not ours[0] and all(ours[1:]), "a position without any"
            for one, other in zip(ours[1:], theirs[1:], strict=True):
                assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < TOLERANCE, pass_
            assert answer["cached"] == 0
        scene.settle(vllm)
    answers = vllm.generate(PROMPTS, max_tokens=4)
    found_all(PROMPTS, answers)
    assert_same(answers, expected, "from what was computed for them")


def test_structured_output(scene, zygote):
    """A grammar masks tokens of the first step already, which is the one that a load delays."""
    # No token is the beginning of a word that is allowed: whatever is chosen, it can go on.
    asked = {"regex": "(w[3-9]){8}", "max_tokens": 8}
    model = spoken()
    with Vllm(zygote, model, skip_tokenizer_init=False) as plain:
        expected = plain.generate(PROMPTS, **asked)
    vllm = scene.vllm(model, skip_tokenizer_init=False)
    for pass_ in ("cold", "warm"):
        answers = vllm.generate(PROMPTS, together=True, **asked)
        for answer in answers:
            assert re.fullmatch(asked["regex"], "".join(f"w{token}" for token in answer["tokens"])), (pass_, answer["tokens"])
        assert_same(answers, expected, pass_)
        scene.settle(vllm)
    found_all(PROMPTS, answers)


def test_speculation_by_ngrams(scene, baseline, llama):
    """Drafts that are refused have been written into blocks: none of them is stored. `baseline` does not speculate."""
    config = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    # Answers of four words repeat themselves, so some drafts are accepted and some refused.
    asked = {"allowed_token_ids": [5, 6, 7, 8], "max_tokens": 48}
    expected = baseline.answers(llama, PROMPTS, **asked)
    vllm = scene.vllm(speculative_config=config)
    for pass_ in ("cold", "warm"):
        steps = vllm.counted_steps()
        answers = vllm.generate(PROMPTS, **asked)
        steps = vllm.counted_steps() - steps
        assert_same(answers, expected, pass_)
        scene.settle(vllm)
    found_all(PROMPTS, answers)
    assert steps < 40 * len(PROMPTS), f"hardly a draft was accepted: {steps} steps"
    # What was generated under drafts is in the cache too, and right.
    longer = [ask + answer["tokens"][:-4] for ask, answer in zip(PROMPTS, expected, strict=True)]
    answers = vllm.generate(longer, max_tokens=8)
    assert_same(answers, baseline.answers(llama, longer, max_tokens=8), "a later turn")
    assert all(a["cached"] >= whole_blocks(len(ask)) - BLOCK for ask, a in zip(longer, answers, strict=True))


def test_a_streaming_session_that_truncates(scene, zygote, baseline, llama):
    """The last token of an answer is discarded when more input comes, and another one takes its place, in its block."""
    # The second answer ends where a block does, the third one just behind.
    pieces = [prompt(7200, 100), prompt(7201, 13), prompt(7202, 23), prompt(7203, 60)]
    with Vllm(zygote, llama) as plain:
        expected = plain.session(pieces, max_tokens=8)
    vllm = scene.vllm()
    for pass_ in ("cold", "warm"):
        assert vllm.session(pieces, max_tokens=8) == expected, pass_
        scene.settle(vllm)
    # Every prefix of it as a request of its own: what the session stored is what those tokens are.
    tokens = expected["tokens"]
    for length in (100, 128, 160, len(tokens)):
        answers = vllm.generate([tokens[:length]], max_tokens=8)
        assert_same(answers, baseline.answers(llama, [tokens[:length]], max_tokens=8), f"the first {length} tokens")
        assert answers[0]["cached"] >= least_loadable(length) - BLOCK, answers[0]["cached"]
