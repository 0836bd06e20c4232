"""Scenarios of several tests: kvring must pass them, and broken connectors must not.

Each asserts as it goes, so a broken variant fails with an `AssertionError`.
"""

import random
from typing import Any

from real.compare import assert_found, assert_same
from real.prompts import BLOCK, least_loadable, prompt, whole_blocks
from real.scene import Scene
from real.vllm import Vllm

TIGHT = {"num_gpu_blocks_override": 11, "max_model_len": 320}
"""Room for ten blocks (one is vLLM's null block): two requests of 207 tokens need fourteen, so one preempts the other."""

TWO_RANKS = {"tensor_parallel_size": 2, "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}}


def check_lookups(answer: dict[str, Any]) -> None:
    """P5: within an admission every question has the same answer, whatever came before it."""
    by_admission: dict[int, set[int]] = {}
    for lookup in answer["lookups"]:
        if lookup["found"] is not None:
            by_admission.setdefault(lookup["admission"], set()).add(lookup["local"] + lookup["found"])
    changed = {admission: found for admission, found in by_admission.items() if len(found) > 1}
    assert not changed, f"a lookup's answer changed within an admission: {changed}"


def check_resumed(answer: dict[str, Any], at_once: bool) -> None:
    """P5: a preempted request loads the whole blocks that it had computed, generated tokens included.

    The last of them may be missing: its store may have been given up by the preemption, or be under way. Not `at_once`: while
    another one's synchronous load is not known to be good nothing is stored, and a request that is preempted then has stored
    nothing."""
    check_lookups(answer)
    for lookup in answer["lookups"]:
        if at_once and lookup["admission"] > 0 and lookup["found"] is not None:
            # The last token was sampled and not computed yet.
            least = least_loadable(lookup["tokens"]) - BLOCK
            have = lookup["found"] + lookup["local"]
            assert have >= least, f"resumed with {have} of {lookup['tokens']} tokens, at least {least} were stored: {lookup}"


def next_turn(scene: Scene, vllm: Vllm, prompts: list[list[int]], output: int, left: int, **params: Any) -> list[list[int]]:
    """A later turn of each conversation: its prompt with what was generated, but for the last `left` tokens."""
    answers = scene.right(vllm.model, prompts, output, **params)
    return [ask + answer["tokens"][: output - left] for ask, answer in zip(prompts, answers, strict=True)]


def preemption(scene: Scene, vllm: Vllm, prompts: list[list[int]], output: int, at_once: bool = True) -> bool:
    """All prompts at once, more than fit: P4 now, P5 when they resume, and P4 again in a second pass from the cache.

    Returns whether a resumed request has loaded anything. It must have, where stores go on `at_once` (see `check_resumed`)."""
    expected = scene.right(vllm.model, prompts, output)
    answers = vllm.generate(prompts, together=True, max_tokens=output)
    resumed = [answer for answer in answers if answer["preemptions"]]
    assert resumed, "nothing was preempted: this test tests nothing"
    for answer in answers:
        check_resumed(answer, at_once)
    has_loaded = any(sum(answer["external"]) for answer in resumed)
    assert has_loaded or not at_once, f"no resumed request loaded anything: {[a['external'] for a in answers]}"
    assert_same(answers, expected, "under preemption")

    scene.settle(vllm)
    vllm.reset()
    second = next_turn(scene, vllm, prompts, output, left=4)
    assert_found(second, scene.ask(vllm, second, "second pass"), "second pass", less=BLOCK)
    return has_loaded


def minimal_preemption(scene: Scene, seed: int = 1000, **vllm: Any) -> None:
    """The minimal case: two requests of 10 tokens that each want 197, and room for one of them and a half."""
    preemption(scene, scene.vllm(**TIGHT, **vllm), [prompt(seed + i, 10) for i in range(2)], output=197)


def random_preemption(scene: Scene, vllm: Vllm, seed: int, blocks: int, at_once: bool = True) -> bool:
    """Requests of random lengths, each of which fits alone, all of them at once. Has a resumed request loaded anything?"""
    draw = random.Random(seed)
    output = draw.randrange(60, 200)
    most = (blocks - 1) * BLOCK - output - 1
    prompts = [prompt(seed * 100 + i, draw.randrange(2, min(most, 200))) for i in range(draw.randrange(4, 8))]
    return preemption(scene, vllm, prompts, output, at_once=at_once)


def poisoning(scene: Scene, vllm: Vllm, seed: int) -> None:
    """A load fails (somebody has arranged for that), and a synchronous one leaves garbage to what is computed in that very step.

    The request itself is computed again and right in any case. What must not happen is that the garbage is stored: only
    a later request that hits it would show that."""
    whole = prompt(seed, 10 * BLOCK + 5)
    head = whole[: 4 * BLOCK]
    scene.ask(vllm, [head], "cold")
    scene.settle(vllm)
    vllm.reset()
    (first,) = scene.ask(vllm, [whole], "with a failed load")
    assert first["external"][0] >= least_loadable(len(head)), f"no load that could fail: {first['external']}"
    scene.settle(vllm)
    vllm.reset()
    (again,) = scene.ask(vllm, [whole], "after a failed load")
    assert again["cached"] >= whole_blocks(len(head)), "nothing was stored after a failed load"
