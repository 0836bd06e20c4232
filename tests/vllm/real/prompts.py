"""Prompts by seed. The model has no tokenizer: a prompt is a list of token ids."""

import random

BLOCK = 32
"""Tokens of a block in all these tests: the smallest that vLLM's CPU backend takes."""

VOCABULARY = 2048

EDGES = (1, 31, 32, 33, 64, 100, 320, 321, 700, 4096)
"""Prompt lengths around block edges, and one that takes several chunks of prefill."""


def prompt(seed: int, length: int) -> list[int]:
    """`length` token ids; a longer prompt of the same seed begins with the shorter one."""
    draw = random.Random(seed)
    return [draw.randrange(3, VOCABULARY) for _ in range(length)]


def whole_blocks(tokens: int) -> int:
    """The tokens of `tokens` that fill blocks: what a cache that has all of a prompt can bring at most.

    An asynchronous load may bring the last token as well (vLLM computes it again), a synchronous one must leave it out."""
    return tokens // BLOCK * BLOCK


def least_loadable(prompt_tokens: int) -> int:
    """What such a cache must bring at least: all whole blocks before the last token."""
    return whole_blocks(prompt_tokens - 1)
