"""vLLM's engine core in a process of its own, as `vllm serve` has it: it steps by itself, and ends by itself."""

import os
import signal
from pathlib import Path

import pytest
from real.compare import assert_same
from real.prompts import BLOCK, prompt
from real.vllm import Vllm
from waiting import wait_for

OWN = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
PROMPTS = [prompt(1100 + index, 4 * BLOCK + 5) for index in range(3)]


@pytest.mark.parametrize("what", ["reset", "reset_with_connector", "sleep"])
def test_a_reset_right_after_the_last_token(scene, baseline, llama, zygote, what):
    """While kvring still stores it is done, or refused, as it is without kvring."""
    expected = baseline.answers(llama, PROMPTS, max_tokens=8)

    def resets(vllm: Vllm) -> list[bool | None]:
        done = []
        for _ in range(3):
            assert_same(vllm.generate(PROMPTS, max_tokens=8, together=True), expected, what)
            if what == "sleep":
                vllm.sleep(level=1)
                vllm.wake_up()
                done.append(None)
            else:
                done.append(vllm.reset(connector=what == "reset_with_connector", at_once=True))
        return done

    with Vllm(zygote, llama, environment=OWN, enable_prefix_caching=True) as plain:
        right = resets(plain)
    vllm = scene.vllm(broken=("stores_begin_late",), environment=OWN, enable_prefix_caching=True)
    assert resets(vllm) == right
    assert scene.engine.counters()["shards_reserved"] > 0, "nothing was stored: this test tests nothing"


def test_a_vllm_that_is_asked_to_end_says_so_to_the_engine(scene, llama):
    """SIGTERM, as vLLM sends it to its own core. (`vllm serve` sends SIGKILL at once after it, without `--shutdown-timeout`.)"""
    vllm = scene.vllm(environment=OWN)
    vllm.generate(PROMPTS, max_tokens=4)
    before = scene.engine.counters()
    assert before["clients"] == 2
    for child in Path(f"/proc/{vllm.pid}/task/{vllm.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGTERM)
    wait_for(lambda: scene.engine.counters()["clients"] == 0, "scheduler and worker have left")
    after = scene.engine.counters()
    assert (after["detaches"] - before["detaches"], after["deaths"]) == (2, 0)
