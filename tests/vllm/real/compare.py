"""Are two answers the same? Tokens exactly, log-probabilities within `TOLERANCE`."""

import math
from collections.abc import Sequence
from typing import Any

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
    if one["tokens"] != other["tokens"]:
        length = min(len(one["tokens"]), len(other["tokens"]))
        place = next((i for i in range(length) if one["tokens"][i] != other["tokens"][i]), length)
        return (
            f"token {place} of {len(one['tokens'])} and {len(other['tokens'])}: "
            f"{one['tokens'][place : place + 4]} and {other['tokens'][place : place + 4]}"
        )
    far = distance(one, other)
    return f"log-probabilities differ by {far}" if far > TOLERANCE else None


def differences(ones: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[str]:
    """All that is different, with its place in the list."""
    pairs = enumerate(zip(ones, others, strict=True))
    return [f"answer {i}: {what}" for i, (one, other) in pairs if (what := difference(one, other))]


def assert_same(ones: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], about: str = "") -> None:
    found = differences(ones, others)
    assert not found, f"{about}: {found}"
