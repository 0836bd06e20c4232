"""Beside another connector, in a `MultiConnector`: kvring does not trust the blocks that the other one loads either."""

from typing import Any

import pytest
from harness.driver import Wanted
from harness.support import forget, harness, is_right, run

import kvring
from kvring.vllm import KvringConnector

LOADED = 16
"""Tokens that the other connector says it has: four blocks. It writes nothing, so they keep their old content."""

_failed: list[int] = []
_to_load: dict[str, int] = {}


class BesideAnother(KvringConnector):
    """Behaves as a `MultiConnector` of kvring and a connector that loads synchronously, and fails."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """kvring is asked first and finds nothing, so the other one is chosen."""
        answer = super().get_num_new_matched_tokens(request, num_computed_tokens)
        other = _to_load.pop(request.request_id, 0) - num_computed_tokens
        return (other, False) if other > 0 else answer

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """As for a connector that was not chosen."""
        if num_external_tokens and not self.scheduler.trackers[request.request_id].hit.chunks:
            _failed.extend(blocks.get_block_ids()[0][: num_external_tokens // 4])
            num_external_tokens = 0
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """At the end of the step that was to load them."""
        blocks = super().get_block_ids_with_load_errors() | set(_failed)
        _failed.clear()
        return blocks


@pytest.mark.parametrize("ahead", [False, True], ids=["step by step", "steps ahead"])
def test_nothing_is_stored_that_was_computed_from_another_connectors_failed_synchronous_load(
    ahead: bool, engine: kvring.Engine
) -> None:
    """Ahead: vLLM schedules a step before it has seen the output of the one before. Then its own answers are wrong, which is not
    kvring's doing; but what others get from kvring later must be right."""
    made = harness(engine, connector=(__name__, "BesideAnother"), max_batched=16, async_scheduling=ahead)
    prompt = list(range(10, 50))
    _to_load["a"] = LOADED
    made.add(Wanted("a", [*prompt, 900], 6))
    # b finds the blocks that are about to be loaded in vLLM's own prefix cache, in the same step.
    run(made, "b", [*prompt, 901], 6)
    assert made.ledger.counters.get("forgiven_reads"), "nothing was computed from garbage: this test tests nothing"
    forget(made)
    if ahead:
        made.wanted.clear()
        made.ledger.violations.clear()
    run(made, "again", [*prompt, 902], 6)
    made.check_outputs()
    made.shutdown()
    is_right(made)
