"""Are two answers the same: tokens exactly, log-probabilities within `TOLERANCE`? How much of a prompt came from the cache?"""

import math
from collections.abc import Sequence
from typing import Any

from real.prompts import least_loadable, whole_blocks

TOLERANCE = 1e-4
"""Absolute. A batch of another shape adds in another order; that is some 1e-6 here. Wrong KV is more than 1e-2."""


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of log-probabilities: of the chosen tokens, and of the best five. NaN is infinitely far."""
    worst = 0.0
    for ours, theirs in zip(one["logprobs"], other["logprobs"], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            worst = max(worst, math.inf if math.isnan(a - b) else abs(a - b))
    return worst


def difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """What is different, in words; `None` when nothing is."""
    ours, theirs = one["tokens"], other["tokens"]
    if ours != theirs:
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        return f"token {place} of {len(ours)} and {len(theirs)}: {ours[place : place + 4]} and {theirs[place : place + 4]}"
    far = distance(one, other)
    return f"log-probabilities differ by {far}" if far > TOLERANCE else None


def differences(ones: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[str]:
    """All that is different, with its place in the list."""
    pairs = enumerate(zip(ones, others, strict=True))
    return [f"answer {i}: {what}" for i, (one, other) in pairs if (what := difference(one, other))]


def assert_same(ones: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], about: str = "") -> None:
    found = differences(ones, others)
    assert not found, f"{about}: {found}"


def assert_found(prompts: Sequence[list[int]], answers: Sequence[dict[str, Any]], about: str = "", *, less: int = 0) -> None:
    """The cache had all whole blocks of every prompt, but for its last `less` tokens."""
    for ask, answer in zip(prompts, answers, strict=True):
        least, found = least_loadable(len(ask) - less), answer["cached"]
        assert least <= found <= whole_blocks(len(ask)), f"{about}: {found} of {len(ask)} tokens were found, expected {least}"


def assert_loaded(prompts: Sequence[list[int]], answers: Sequence[dict[str, Any]]) -> None:
    """kvring had all whole blocks of every prompt, and vLLM loaded them."""
    for ask, answer in zip(prompts, answers, strict=True):
        least, loaded = least_loadable(len(ask)), sum(answer["external"])
        assert least <= loaded <= whole_blocks(len(ask)), f"{loaded} of {len(ask)} tokens were loaded, expected {least}"
