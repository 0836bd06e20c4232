"""Features of vLLM beyond plain answers, each compared with the same vLLM without a connector."""

import re

from real.compare import TOLERANCE, assert_found, assert_same
from real.models import model, spoken
from real.prompts import BLOCK, least_loadable, prompt
from real.scenarios import next_turn
from real.vllm import Vllm

PROMPTS = [prompt(7000 + length, length) for length in (31, 33, 100, 321)]


def both_passes(scene, zygote, folder, asked, check, **llm):
    """Asks a plain vLLM once, and one with kvring twice; `check` compares. Returns the one with kvring, which has stored all
    prompts, its last answers, and the plain one's."""
    with Vllm(zygote, folder, **llm) as plain:
        expected = plain.generate(PROMPTS, **asked)
    vllm = scene.vllm(folder, **llm)
    for about in ("cold", "warm"):
        answers = vllm.generate(PROMPTS, **asked)
        check(answers, expected, about)
        scene.settle(vllm)
    return vllm, answers, expected


def test_several_answers_to_one_prompt_are_those_without_kvring(scene, zygote):
    """`n` > 1: as many requests of one prompt at once. Each draws its own tokens, and loads or shares the same blocks."""

    def check(answers, expected, about):
        assert [a["choices"] for a in answers] == [e["choices"] for e in expected], about

    sampled = {"n": 3, "temperature": 2.0, "seed": 5, "max_tokens": 8}
    _, answers, expected = both_passes(scene, zygote, model(), sampled, check)
    assert all(len({tuple(choice) for choice in answer["choices"]}) == 3 for answer in expected), expected
    assert_found(PROMPTS, answers)


def test_log_probabilities_of_a_prompt_are_those_without_kvring(scene, zygote):
    """vLLM computes the whole prompt for them, whatever is cached; and what it computes is stored."""

    def check(answers, expected, about):
        assert_same(answers, expected, about)
        for answer, right in zip(answers, expected, strict=True):
            ours, theirs = answer["prompt_logprobs"], right["prompt_logprobs"]
            assert len(ours) == len(theirs) and not ours[0] and all(ours[1:]), "a position without any"
            for one, other in zip(ours[1:], theirs[1:], strict=True):
                assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < TOLERANCE, about
            assert answer["cached"] == 0

    vllm, _, _ = both_passes(scene, zygote, model(), {"prompt_logprobs": 3, "max_tokens": 4}, check)
    assert_found(PROMPTS, scene.ask(vllm, PROMPTS, "from what was computed for them", max_tokens=4))


def test_structured_output_is_that_without_kvring(scene, zygote):
    """A grammar masks tokens of the first step already, which is the one that a load delays."""
    # No token is the beginning of a word that is allowed: whatever is chosen, it can go on.
    asked = {"regex": "(w[3-9]){8}", "max_tokens": 8}

    def check(answers, expected, about):
        for answer in answers:
            assert re.fullmatch(asked["regex"], "".join(f"w{token}" for token in answer["tokens"])), (about, answer["tokens"])
        assert_same(answers, expected, about)

    _, answers, _ = both_passes(scene, zygote, spoken(), {**asked, "together": True}, check, skip_tokenizer_init=False)
    assert_found(PROMPTS, answers)


def test_tokens_that_speculation_has_refused_are_not_stored(scene):
    """Drafts that are refused have been written into blocks. The answers are those of a vLLM that does not speculate."""
    config = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    # Answers of four words repeat themselves, so some drafts are accepted and some refused.
    asked = {"allowed_token_ids": [5, 6, 7, 8], "max_tokens": 48}
    vllm = scene.vllm(speculative_config=config)
    for about in ("cold", "warm"):
        before = vllm.counted_steps()
        answers = scene.ask(vllm, PROMPTS, about, **asked)
        steps = vllm.counted_steps() - before
        scene.settle(vllm)
    assert_found(PROMPTS, answers)
    assert steps < 40 * len(PROMPTS), f"hardly a draft was accepted: {steps} steps"
    # What was generated under drafts is in the cache too, and right.
    longer = next_turn(scene, vllm, PROMPTS, 48, left=4, allowed_token_ids=asked["allowed_token_ids"])
    assert_found(longer, scene.ask(vllm, longer, "a later turn"), less=BLOCK - 1)


def test_a_streaming_session_that_truncates_stores_what_its_tokens_are(scene, zygote):
    """The last token of an answer is discarded when more input comes, and another one takes its place, in its block."""
    # The second answer ends where a block does, the third one just behind.
    pieces = [prompt(7200, 100), prompt(7201, 13), prompt(7202, 23), prompt(7203, 60)]
    with Vllm(zygote, model()) as plain:
        expected = plain.session(pieces, max_tokens=8)
    vllm = scene.vllm()
    for about in ("cold", "warm"):
        assert vllm.session(pieces, max_tokens=8) == expected, about
        scene.settle(vllm)
    # Every prefix of the session is asked as a request of its own.
    tokens = expected["tokens"]
    for length in (100, 128, 160, len(tokens)):
        (answer,) = scene.ask(vllm, [tokens[:length]], f"the first {length} tokens")
        assert answer["cached"] >= least_loadable(length) - BLOCK, answer["cached"]
