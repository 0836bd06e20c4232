"""A test's scene: an engine, the vLLMs that use it, and what must be true of them when the test is over."""

from pathlib import Path
from typing import Any

from waiting import PATIENT, wait_for

from real.baseline import Baseline
from real.engine import Engine
from real.logs import repeated
from real.models import model as make_model
from real.prompts import least_loadable
from real.vllm import Connector, Vllm, Zygote

LOOKUP_MS = 5.0
"""The deadline of a lookup that users have, kvring's default."""

SLACK_MS = 500.0
"""What a call may take beyond that: our own Python, page faults, threads of ours that it waits for and that have no core.
Time in which the thread itself was ready and had no core does not count at all (see `tap.Clock`)."""

ATTEMPTS = 1000
"""How often a prompt is asked before its hit counts as lost: the engine is attached and answers in far fewer, and each takes
longer where the machine is slow."""

MULTI = "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector"

UNBOUNDED = {"__init__", "register_kv_caches", "shutdown"}
"""Start and end have deadlines of their own, in seconds; no request waits for them."""


class Scene:
    """Makes vLLMs for one engine. `standin`: the stand-in connector takes kvring's place, and there is no engine."""

    def __init__(self, zygote: Zygote, baseline: Baseline, directory: Path, standin: bool = False) -> None:
        self.zygote, self.baseline, self.standin = zygote, baseline, standin
        self.engine = Engine(directory=directory)
        self.vllms: list[Vllm] = []
        self.hasty: list[Vllm] = []
        """Those whose calls have deadlines."""

    def options(self, hasty: bool = False, **options: Any) -> dict[str, Any]:
        """kvring's configuration: `load="sync"` is `kvring.load`, and so on."""
        patience = {} if hasty else PATIENT
        return {"kvring.name": self.engine.name, **patience, **{f"kvring.{key}": value for key, value in options.items()}}

    def vllm(
        self,
        model: str | None = None,
        *,
        policy: str = "recompute",
        broken: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        kvring: dict[str, Any] | None = None,
        hasty: bool = False,
        beside: tuple[list[dict[str, Any]], list[dict[str, Any]]] | None = None,
        **llm: Any,
    ) -> Vllm:
        """A vLLM with the connector; it starts in the background until it is asked something.

        `hasty`: with the deadlines that users have, and its calls must keep them. Else it waits for the engine as long as
        that takes. `beside`: in a `MultiConnector`, with these before it and those behind it."""
        options = kvring or {}
        if self.standin:
            connector = Connector("StandIn", "real.standin", {"load": options.get("load", "async")}, policy)
        elif beside is not None:
            # By its name alone: that is what `MultiConnector` asks for it by.
            ours = {
                "kv_connector": "KvringConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": self.options(hasty, **options),
            }
            connector = Connector("MultiConnector", MULTI, {"connectors": [*beside[0], ours, *beside[1]]}, policy)
        else:
            connector = Connector("KvringConnector", "kvring.vllm", self.options(hasty, **options), policy)
        made = Vllm(self.zygote, model or make_model(), connector, broken=broken, environment=environment, **llm)
        self.vllms.append(made)
        if hasty:
            self.hasty.append(made)
        return made

    def settle(self, vllm: Vllm) -> None:
        """Waits until what this vLLM stores is stored."""
        if self.standin:
            return
        # Workers in processes of their own are out of reach: what they have in hand is seen when they ask the engine.
        workers_here = vllm.act(action="worker_idle")
        self.engine.settle(quiet_reads=4 if workers_here else 20)

    def hits_are_back(self, vllm: Vllm, prompt: list[int], **params: Any) -> dict[str, Any]:
        """Asks again and again until the whole prompt comes from the cache."""
        for _ in range(ATTEMPTS):
            vllm.reset()
            answer = vllm.generate([prompt], **params)[0]
            if sum(answer["external"]) >= least_loadable(len(prompt)):
                return answer
        raise AssertionError(f"not found in {ATTEMPTS} attempts: {answer['external']} of {len(prompt)}\n{vllm.tail()}")

    def check(self) -> None:
        """What must hold at the end of every test: P0, no exception in the log, every call within its deadline."""
        for vllm in self.vllms:
            if vllm.closed:
                continue
            log = vllm.log_since_ready()
            for bad in ("Traceback", "an error inside kvring"):
                assert bad not in log, log[-4000:]
            assert not (said := repeated(log)), f"said more than once: {said}\n{log[-4000:]}"
            if vllm in self.hasty:
                self.check_calls(vllm)
            state = vllm.scheduler_state()
            assert state is None or not any(state.values()), f"left in the scheduler: {state}"
        if not self.standin and self.engine.state() == "serving" and self.vllms:
            self.engine.settle()
            self.no_leases()

    def check_calls(self, vllm: Vllm) -> None:
        limit = LOOKUP_MS + SLACK_MS
        late = {
            method: f"{longest * 1e3:.1f} ms"
            for method, (_, longest, _) in vllm.all_calls().items()
            if method not in UNBOUNDED and longest * 1e3 > limit
        }
        assert not late, f"calls of the connector longer than {limit} ms: {late}"

    def no_leases(self) -> None:
        def none() -> bool:
            held = self.engine.counters()
            return not (held["leases"] or held["pins"])

        wait_for(none, "no lease is left")

    def close(self) -> None:
        try:
            for vllm in self.vllms:
                vllm.close()
        finally:
            if not self.standin:
                self.engine.close()
