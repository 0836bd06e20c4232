"""A test's scene: an engine, the vLLMs that use it, and what must be true of them when the test is over."""

import time
from pathlib import Path
from typing import Any

from real.baseline import Baseline
from real.engine import Engine
from real.logs import repeated
from real.models import model as make_model
from real.vllm import Connector, Vllm, Zygote

SLACK_MS = 50.0
"""What a call may take beyond its deadline: our own Python, page faults, a machine that is not ours alone. Time in which
the thread was ready and had no core does not count at all (see `tap.Clock`)."""

PATIENT_MS = 500.0
"""`kvring.lookup_timeout_ms` where a test asks for hits: on a busy machine an answer may take longer than users would wait."""

UNBOUNDED = {"__init__", "register_kv_caches", "shutdown"}
"""Start and end have deadlines of their own, in seconds; no request waits for them."""


class Scene:
    """Makes vLLMs for one engine. `standin`: the stand-in connector takes kvring's place, and there is no engine."""

    def __init__(self, zygote: Zygote, baseline: Baseline, directory: Path, standin: bool = False) -> None:
        self.zygote, self.baseline, self.standin = zygote, baseline, standin
        self.engine = Engine(directory=directory)
        self.vllms: list[Vllm] = []
        self.deadline_ms = PATIENT_MS

    def options(self, **options: Any) -> dict[str, Any]:
        """kvring's configuration: `load="sync"` is `kvring.load`, and so on."""
        return {"kvring.name": self.engine.name, **{f"kvring.{key}": value for key, value in options.items()}}

    def vllm(
        self,
        model: str | None = None,
        *,
        policy: str = "recompute",
        broken: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        kvring: dict[str, Any] | None = None,
        **llm: Any,
    ) -> Vllm:
        """A vLLM with the connector; it starts in the background until it is asked something."""
        options = {"lookup_timeout_ms": PATIENT_MS, **(kvring or {})}
        self.deadline_ms = options["lookup_timeout_ms"]
        if self.standin:
            connector = Connector("StandIn", "real.standin", {"load": options.get("load", "async")}, policy)
        else:
            connector = Connector("KvringConnector", "kvring.vllm", self.options(**options), policy)
        made = Vllm(self.zygote, model or make_model(), connector, broken=broken, environment=environment, **llm)
        self.vllms.append(made)
        return made

    def settle(self, vllm: Vllm) -> None:
        """Waits until what this vLLM stores is stored."""
        if self.standin:
            return
        # Workers in processes of their own are out of reach: what they have in hand is seen when they ask the engine.
        workers_here = vllm.act(action="worker_idle")
        self.engine.settle(quiet_reads=4 if workers_here else 20)

    def hits_are_back(self, vllm: Vllm, prompt: list[int], seconds: float = 1.0, **params: Any) -> dict[str, Any]:
        """Asks again and again until the answer comes from the cache; fails when that takes longer than `seconds`."""
        began = time.monotonic()
        while True:
            vllm.reset()
            answer = vllm.generate([prompt], **params)[0]
            if answer["cached"]:
                return answer
            waited = time.monotonic() - began
            assert waited < seconds, f"no hit {waited:.2f} s after the engine serves again\n{vllm.tail()}"

    def check(self) -> None:
        """What must hold at the end of every test: P0, no exception in the log, every call within its deadline."""
        for vllm in self.vllms:
            if vllm.closed:
                continue
            log = vllm.log_since_ready()
            for bad in ("Traceback", "an error inside kvring"):
                assert bad not in log, log[-4000:]
            assert not (said := repeated(log)), f"said more than once: {said}\n{log[-4000:]}"
            self.check_calls(vllm)
            state = vllm.scheduler_state()
            assert state is None or not any(state.values()), f"left in the scheduler: {state}"
        if not self.standin and self.engine.state() == "serving" and self.vllms:
            self.engine.settle()
            self.no_leases()

    def check_calls(self, vllm: Vllm) -> None:
        limit = self.deadline_ms + SLACK_MS
        late = {
            method: f"{longest * 1e3:.1f} ms"
            for method, (_, longest, _) in vllm.all_calls().items()
            if method not in UNBOUNDED and longest * 1e3 > limit
        }
        assert not late, f"calls of the connector longer than {limit} ms: {late}"

    def no_leases(self) -> None:
        deadline = time.monotonic() + 5
        while (held := self.engine.counters())["leases"] or held["pins"]:
            assert time.monotonic() < deadline, f"leases are left: {held}"
            time.sleep(0.01)

    def close(self) -> None:
        try:
            for vllm in self.vllms:
                vllm.close()
        finally:
            if not self.standin:
                self.engine.close()
