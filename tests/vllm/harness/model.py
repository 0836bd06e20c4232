"""A model whose KV says what it was computed from.

The KV of layer `l` at position `p` is eight bytes: a hash of all tokens up to `p`, of what separates requests (salt, LoRA),
of the layer, and of the rank unless ranks are replicas. Wrong KV can therefore be seen at once, and named. The next token is a
function of the same hash, so that the right output of every request is known before anything runs.
"""

import numpy as np

from .config import VOCAB

MASK = (1 << 64) - 1
TAINT = np.uint64(0x5555_0000_5555_0000)
"""Flips bytes that were computed from wrong KV: wrong KV must spread as it does in a real model."""
POISON = 0xEE
"""Fills a block that has got a new owner. A reader that still expects the old content gets this."""
POISON_WORD = np.uint64(0xEEEE_EEEE_EEEE_EEEE)


def mix(value: int, word: int) -> int:
    """One round of splitmix64."""
    value = (value ^ (word + 0x9E37_79B9_7F4A_7C15)) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58_476D_1CE4_E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D0_49BB_1331_11EB) & MASK
    return value ^ (value >> 31)


def seed_of(salt: str | None, lora: str | None) -> int:
    """Where the hash of a request starts."""
    value = 1
    for byte in f"{salt or ''}\0{lora or ''}".encode():
        value = mix(value, byte)
    return value


def extend(hashes: list[int], seed: int, tokens: list[int]) -> None:
    """Brings the running hash up to the last of `tokens`."""
    value = hashes[-1] if hashes else seed
    for token in tokens[len(hashes) :]:
        value = mix(value, token)
        hashes.append(value)


def kv(hashes: "np.ndarray | list[int]", layer: int, rank: int) -> np.ndarray:
    """The KV of these positions in one layer; `rank` is that of the shard, the same for replicas."""
    words = np.asarray(hashes, dtype=np.uint64)
    salt = np.uint64(mix(layer + 1, rank))
    with np.errstate(over="ignore"):
        return words * np.uint64(0x9E37_79B9_7F4A_7C15) + salt


def next_token(last: int) -> int:
    """The next token. None of them ends an answer."""
    return 3 + (last >> 24) % (VOCAB - 3)


def expected_output(prompt: list[int], count: int, seed: int) -> list[int]:
    """The right answer to a request."""
    hashes: list[int] = []
    extend(hashes, seed, prompt)
    output = []
    value = hashes[-1]
    for _ in range(count):
        token = next_token(value)
        output.append(token)
        value = mix(value, token)
    return output
