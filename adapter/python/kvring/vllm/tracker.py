"""The state that is kept for each request. Of vLLM's `Request` only its list of hashes is kept, which vLLM extends in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvring import Hit

from .adapters import Adapter
from .metadata import Outcome

TRIES_MAX = 3
"""How often chunks may be stored again in one admission."""


@dataclass(slots=True)
class OpenLoad:
    """A load that not every rank has reported."""

    job: int
    request: str
    admission: int
    wait: bool
    first_chunk: int
    start: int
    """The first token that it brings."""
    key: bytes = b""
    """The key of its first chunk."""
    outcome: Outcome = field(default_factory=Outcome)


@dataclass(slots=True)
class Tracker:
    """One request, from its first lookup to the end of its last job."""

    request: str
    hashes: Sequence[bytes]
    tokens: Sequence[int] = ()
    lora_name: str | None = None
    """`tokens` and `lora_name` are kept only where KV events are wanted, which carry them."""
    salt: bytes | None = None
    """The salt of its keys in this admission."""
    adapter: Adapter | None = None
    """Its LoRA adapter, as it is known in this admission."""
    admission: int = -1
    """How often vLLM has preempted it: a lookup, a lease and a load belong to one admission."""

    hit: Hit | None = None
    """The answer to this admission's lookup, given again when vLLM asks again."""
    local_tokens: int = 0
    """How many tokens vLLM had itself when it asked last."""
    settled: bool = False
    """vLLM has allocated blocks, so it is decided whether this admission loads. It does so at most once."""
    load: OpenLoad | None = None

    stored_chunks: int = 0
    """Chunks before this one need no storing: they were found, or have been handed to the workers."""
    has_hole: bool = False
    """A chunk cannot be stored, so no later chunk is: it could never be found."""
    tries: int = 0
    """How often chunks had to be stored again in this admission."""
    finished: bool = False

    def begin(self, admission: int, salt: bytes | None, adapter: Adapter | None = None) -> None:
        """Begins the next admission: nothing of the earlier one's answer counts any more."""
        self.admission = admission
        self.salt = salt
        self.adapter = adapter
        self.hit = None
        self.local_tokens = 0
        self.settled = False
        self.stored_chunks = 0
        self.has_hole = False
        self.tries = 0

    def store_again(self, first_chunk: int) -> None:
        """This chunk and those behind it are not in the cache: stores them once more, because nothing behind them could be found.
        At most `TRIES_MAX` times, because where there is no room for them each try costs as much as the first."""
        if first_chunk < self.stored_chunks:
            self.stored_chunks = first_chunk
            self.tries += 1
            self.has_hole |= self.tries > TRIES_MAX
