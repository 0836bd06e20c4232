"""A test's scene: an engine, the vLLMs that use it, and what must be true of them when the test is over."""

from pathlib import Path
from typing import Any

from waiting import PATIENT, wait_for

from real.baseline import Baseline
from real.compare import assert_loaded, assert_same
from real.engine import Engine
from real.logs import repeated
from real.models import model as make_model
from real.prompts import least_loadable
from real.vllm import Connector, Vllm, Zygote

CALL_MS = 500.0
"""What a call of the connector may take. It waits for no engine, but it is Python, it meets page faults, and it may wait for
threads of ours that have no core. Time in which the thread itself was ready and had no core does not count (see `tap.Clock`)."""

ATTEMPTS = 1000
"""How often a prompt is asked before its hit counts as lost: the engine is attached in far fewer, and each takes longer where the
machine is slow."""

MULTI = "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector"

UNBOUNDED = {"__init__", "register_kv_caches", "shutdown"}
"""Start and end have deadlines of their own, in seconds; no request waits for them."""


class Scene:
    """Makes vLLMs for one engine, and compares their answers with those of a vLLM without a connector."""

    def __init__(self, zygote: Zygote, baseline: Baseline, directory: Path) -> None:
        self.zygote, self.baseline = zygote, baseline
        self.engine = Engine(directory=directory)
        self.vllms: list[Vllm] = []
        self.hasty: list[Vllm] = []
        """Those whose calls have deadlines."""

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
        """A vLLM with kvring's options `kvring`; it starts in the background until it is asked something.

        `hasty`: with the deadlines that users have, and its calls must keep them. Else it waits for the engine as long as
        that takes. `beside`: in a `MultiConnector`, with these before it and those behind it."""
        extra = {"kvring.name": self.engine.name, **({} if hasty else PATIENT)}
        extra |= {f"kvring.{key}": value for key, value in (kvring or {}).items()}
        connector = Connector("KvringConnector", "kvring.vllm", extra, policy)
        if beside is not None:
            # By its name alone: `MultiConnector` asks for it by that.
            ours = {"kv_connector": "KvringConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
            connector = Connector("MultiConnector", MULTI, {"connectors": [*beside[0], ours, *beside[1]]}, policy)
        made = Vllm(self.zygote, model or make_model(), connector, broken=broken, environment=environment, **llm)
        self.vllms.append(made)
        if hasty:
            self.hasty.append(made)
        return made

    def right(self, model: str, prompts: list[list[int]], max_tokens: int = 8, **params: Any) -> list[dict[str, Any]]:
        """The answers of a vLLM without a connector."""
        return self.baseline.answers(model, prompts, max_tokens=max_tokens, **params)

    def ask(
        self,
        vllm: Vllm,
        prompts: list[list[int]],
        about: str = "",
        *,
        max_tokens: int = 8,
        together: bool = False,
        salt: str | None = None,
        **params: Any,
    ) -> list[dict[str, Any]]:
        """The answers of this vLLM, which are those of one without a connector."""
        expected = self.right(vllm.model, prompts, max_tokens, **params)
        answers = vllm.generate(prompts, max_tokens=max_tokens, together=together, salt=salt, **params)
        assert_same(answers, expected, about)
        return answers

    def settle(self, vllm: Vllm) -> dict[str, int]:
        """Waits until this vLLM has stored everything; the engine's counters."""
        vllm.worker_idle()
        return self.engine.settle()

    def cold_and_warm(self, vllm: Vllm, prompts: list[list[int]], max_tokens: int = 16, **params: Any) -> None:
        """Nothing is found at first; then all of it is, also where vLLM has forgotten it. The answers are right both times."""
        assert not any(answer["cached"] for answer in self.ask(vllm, prompts, "cold", max_tokens=max_tokens, **params))
        self.settle(vllm)
        vllm.reset()
        assert_loaded(prompts, self.ask(vllm, prompts, "warm", max_tokens=max_tokens, **params))

    def hits_are_back(self, vllm: Vllm, prompt: list[int], about: str = "") -> None:
        """Asks again and again until the whole prompt comes from the cache."""
        for _ in range(ATTEMPTS):
            vllm.reset()
            (answer,) = self.ask(vllm, [prompt], about)
            if sum(answer["external"]) >= least_loadable(len(prompt)):
                return
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
        if self.engine.state() == "serving" and self.vllms:
            self.engine.settle()
            self.no_leases()

    def check_calls(self, vllm: Vllm) -> None:
        late = {
            method: f"{longest * 1e3:.1f} ms"
            for method, (_, longest, _) in vllm.all_calls().items()
            if method not in UNBOUNDED and longest * 1e3 > CALL_MS
        }
        assert not late, f"calls of the connector longer than {CALL_MS} ms: {late}"

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
            self.engine.close()
