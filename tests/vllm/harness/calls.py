"""Watches the scheduler's calls of the connector: obligation P5, and that nothing is ever raised.

The methods are replaced on the instance, because vLLM asks for the connector's type.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .ledger import Ledger


class Raised(Exception):
    """The connector raised: vLLM would be dead now."""


@dataclass
class Asked:
    """The connector's answers so far in this admission."""

    hit: int | None = None
    """The external hit in tokens, if an answer has told it."""
    at_most: int | None = None
    """If not: the hit is no longer than this local hit, for which the answer was 0."""
    last: tuple[int, bool] = (0, False)
    local: int = 0
    expected: int | None = None
    """The tokens that the first lookup of this admission had to find."""


class CallMonitor:
    """Wraps every method of the scheduler-side connector."""

    WRAPPED = (
        "on_new_request",
        "build_connector_meta",
        "update_connector_output",
        "request_finished_all_groups",
        "take_events",
        "reset_cache",
        "has_pending_block_frees",
        "get_kv_connector_stats",
        "get_external_cache_hit_sources",
    )

    def __init__(self, connector: Any, ledger: Ledger, *, slack: int) -> None:
        self.ledger = ledger
        self.strict = True
        """An answer must not change, and what was stored must be found: also while the engine is dead."""
        self.slack = slack
        """Steps after which a store that was reported must be visible."""
        self.asked: dict[str, Asked] = {}
        self.slowest: dict[str, float] = {}
        self.hits: dict[str, int] = {}
        """Tokens that a request has got from the connector, in all."""
        self.no_expectation: set[str] = set()
        """Requests whose load has failed: the connector may rightly answer 0 from now on."""
        self.short: set[str] = set()
        """Requests for which a lookup has found too little: each is blamed once."""
        self.salt: Callable[[str], bytes | None] = lambda request: None
        self._lookup = connector.get_num_new_matched_tokens
        self._alloc = connector.update_state_after_alloc
        connector.get_num_new_matched_tokens = self.lookup
        connector.update_state_after_alloc = self.alloc
        for name in self.WRAPPED:
            setattr(connector, name, self._wrap(name, getattr(connector, name)))

    def call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a connector's function, which must not raise."""
        start = time.perf_counter()
        try:
            return function(*arguments)
        except Exception as error:
            self.ledger.blame("raised", f"{name}: {type(error).__name__}: {error}")
            raise Raised(name) from error
        finally:
            spent = time.perf_counter() - start
            if spent > self.slowest.get(name, 0.0):
                self.slowest[name] = spent

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: self.call(name, function, *arguments)

    def lookup(self, request: Any, local: int) -> tuple[int | None, bool]:
        """`get_num_new_matched_tokens`."""
        self.ledger.count("lookups")
        answer = self.call("get_num_new_matched_tokens", self._lookup, request, local)
        tokens, is_async = answer
        name, total = request.request_id, request.num_tokens
        where = f"lookup of {name} ({total} tokens, {local} local) answered {answer}"
        asked = self.asked.setdefault(name, Asked())
        self.ledger.learn_salt(name, self.salt(name))
        if tokens is None:
            self.ledger.count("waits_for_another_load")
            if asked.expected is None:
                asked.expected = self._expected(name, total)
            return answer
        self.ledger.note(where)
        asked.last, asked.local = (tokens, is_async), local
        if tokens < 0 or local + tokens > total:
            self.ledger.blame("P5", f"{where}: out of range")
        if tokens and not is_async and local + tokens > total - 1:
            self.ledger.blame("P5", f"{where}: a synchronous load must leave the last token")
        if not tokens and is_async:
            self.ledger.blame("P5", f"{where}: nothing is loaded asynchronously")
        self._same_again(asked, where, local, tokens, total)
        self._found_what_was_stored(asked, name, where, local, tokens, total)
        return answer

    def _same_again(self, asked: Asked, where: str, local: int, tokens: int, total: int) -> None:
        size = self.ledger.block_size
        if tokens:
            hit = local + tokens
            if hit == total - 1 and total % size == 0:
                hit = total
            if hit % size:
                self.ledger.blame("P5", f"{where}: the hit ends within a block")
            if self.strict and asked.hit is not None and asked.hit != hit:
                self.ledger.blame("P5", f"{where}: the hit was {asked.hit} before")
            if self.strict and asked.at_most is not None and hit > asked.at_most:
                self.ledger.blame("P5", f"{where}: there was nothing beyond {asked.at_most} before")
            asked.hit = hit
        else:
            if self.strict and asked.hit is not None and asked.hit > local:
                self.ledger.blame("P5", f"{where}: the hit was {asked.hit} before")
            asked.at_most = local if asked.at_most is None else min(asked.at_most, local)

    def _found_what_was_stored(self, asked: Asked, name: str, where: str, local: int, tokens: int, total: int) -> None:
        """A resumed request finds what it had generated, and a second one what the first had computed."""
        if asked.expected is None:
            asked.expected = self._expected(name, total)
        if local + tokens < asked.expected and name not in self.short:
            self.ledger.blame("P5", f"{where}: {asked.expected} tokens were there")
            self.short.add(name)

    def cache_was_reset(self) -> None:
        """A request that waits may be told that there is nothing any more, or keep what it was promised."""
        for asked in self.asked.values():
            asked.hit = asked.at_most = None
            asked.expected = 0

    def _expected(self, name: str, total: int) -> int:
        ledger = self.ledger
        if not self.strict or name in self.no_expectation or ledger.requests[name].skip_reading_prefix_cache:
            return 0
        chunk = 0
        while keys := ledger.chunk_keys(name, chunk):
            step = ledger.stored.get(keys[-1])
            if step is None or step + self.slack > ledger.step:
                break
            chunk += 1
        return min(chunk * ledger.chunk_tokens, total - 1)

    def alloc(self, request: Any, blocks: Any, tokens: int) -> None:
        """`update_state_after_alloc`."""
        self.call("update_state_after_alloc", self._alloc, request, blocks, tokens)
        name = request.request_id
        asked = self.asked.get(name)
        if asked is not None:
            # The first one after a lookup begins an admission; a second one (after an asynchronous load) does not.
            self.ledger.admit(name, asked.local, tokens, asked.last[1] and tokens > 0)
            del self.asked[name]
            self.hits[name] = self.hits.get(name, 0) + tokens
            if tokens:
                self.ledger.count("hits")
                self.ledger.count("hit_tokens", tokens)
