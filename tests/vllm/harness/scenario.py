"""Random scenarios: a seed is a workload, a configuration and a list of mishaps."""

import itertools
import os
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from . import config as configs
from .calls import Raised
from .driver import Harness, Plug, Wanted
from .jobs import Faults
from .ledger import Violation

_runs = itertools.count()


@dataclass
class Target:
    """A connector under test."""

    name: str
    module: str
    plug: Plug
    extra: Callable[[dict[str, Any]], dict[str, Any]]
    """`kv_connector_extra_config` from a scenario's choices."""
    kill: Callable[[], None] | None = None
    restart: Callable[[], None] | None = None
    watch: Callable[[Harness], None] = lambda harness: None
    """Called once an engine is built."""


@dataclass
class Report:
    """The result of a scenario."""

    seed: int
    choices: dict[str, Any]
    violations: list[Violation] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    slowest_ms: dict[str, float] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    seconds: float = 0.0
    excused: bool = False

    @property
    def rules(self) -> set[str]:
        """The obligations that were not met."""
        return {violation.rule for violation in self.violations}

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {len(self.violations)} violations", f"choices: {self.choices}"]
        lines += [f"  {violation}" for violation in self.violations[:20]]
        lines += [f"counters: {self.counters}", "the last steps:"]
        if self.violations:
            first = next((i for i, line in enumerate(self.log) if line.startswith("  !! ")), len(self.log))
            lines += self.log[max(0, first - 60) : first + 12]
        return "\n".join(lines)


def choose(seed: int, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The choices of a seed. Every choice is drawn, overridden or not, so that an override changes nothing else."""
    dice = random.Random(seed)
    # Of eight seeds one each is about failed loads, resets, engine faults; the others mix the rest.
    theme = dice.choice(["plain", "plain", "plain", "plain", "fail", "reset", "abort", "engine"])
    window = dice.choice([None, None, None, 6, 9, 13])
    sync = dice.random() < 0.4
    choices: dict[str, Any] = {
        "theme": theme,
        "window": window,
        "load": "sync" if sync and window is None else "async",
        "chunk_blocks": dice.choice([1, 1, 2, 3]),
        "parallel": dice.choice([(1, 1), (1, 1), (2, 1), (2, 2)]),
        "layout": dice.choice(["LBHNC", "LBHNC", "BLHNC"]),
        "prefix_caching": dice.random() < 0.6,
        "policy": dice.choice(["fcfs", "fcfs", "priority"]),
        "max_batched": dice.choice([8, 16, 24, 48]),
        "max_seqs": dice.choice([2, 4, 4, 6]),
        "long_prefill": dice.choice([0, 0, 5]),
        "failure_policy": dice.choice(["recompute", "recompute", "fail"]),
        "v2_runner": dice.random() < 0.4,
        "async_scheduling": dice.random() < 0.25,
        "late_workers": dice.random() < 0.5,
        "slack_blocks": dice.choice([0, 0, 2, 8]),
        "hold": dice.choice([0.0, 0.3, 0.7]),
        "fail_load": 0.4 if theme == "fail" else 0.0,
        "fail_rank": dice.choice([None, 0, 1]),
        "requests": dice.randint(3, 9),
        "resets": theme == "reset",
        "aborts": 0.15 if theme == "abort" else 0.03,
        "kill_at": dice.randint(3, 40) if theme == "engine" else None,
        "down_for": dice.randint(1, 30),
        "second_pass": True,
        "max_model_len": 96,
        "step_limit": 1000,
        "patience": 10_000,
        "only_windows": dice.random() < 0.5,
        "fail_store": dice.choice([0.0, 0.2]) if theme == "fail" else 0.0,
    }
    choices.update(overrides or {})
    if choices["window"] is not None and "chunk_blocks" not in (overrides or {}):
        # A connector may refuse chunks that are longer than a window.
        choices["chunk_blocks"] = min(choices["chunk_blocks"], choices["window"] // 4)
    if choices["parallel"][0] == 1 and choices["fail_rank"] == 1:
        choices["fail_rank"] = 0
    if choices["load"] == "sync":
        # vLLM would know a step too late that a load has failed.
        choices["async_scheduling"] = False
    if choices["window"] is not None:
        choices["load"] = "async"
        choices["max_batched"] = min(choices["max_batched"], 24)
    return choices


def workload(dice: random.Random, choices: Mapping[str, Any], tag: str) -> list[tuple[int, Wanted]]:
    """(step of arrival, request): prefixes are shared, some diverge, lengths lie around block edges."""
    stems = [[dice.randint(3, 990) for _ in range(60)] for _ in range(2)]
    salts: list[str | None] = [None, None, None, "salt"]
    loras: list[str | None] = [None, None, None, None, "lora"]
    work = []
    at = 0
    for index in range(choices["requests"]):
        prompt = list(dice.choice(stems)[: dice.choice([1, 3, 4, 5, 8, 12, 16, 24, 31, 40, 60])])
        prompt += [dice.randint(3, 990) for _ in range(dice.choice([0, 0, 1, 3, 4, 9]))]
        count = min(dice.choice([1, 2, 5, 9, 16, 24, 34, 50]), choices["max_model_len"] - len(prompt))
        work.append(
            (
                at,
                Wanted(
                    f"{tag}{index}",
                    prompt,
                    count,
                    salt=dice.choice(salts),
                    lora=dice.choice(loras),
                    priority=dice.randint(0, 2),
                    skip_reading=dice.random() < 0.05,
                ),
            )
        )
        at += dice.choice([0, 0, 0, 1, 2, 7])
    return work


def run_scenario(target: Target, seed: int, overrides: Mapping[str, Any] | None = None) -> Report:
    """Runs a seed and says what went wrong."""
    start = time.perf_counter()
    choices = choose(seed, overrides)
    dice = random.Random(seed ^ 0x5EED)
    tp, replicas = choices["parallel"]
    least = choices["max_model_len"] // 4 + 2
    if choices["window"] is not None:
        least += (choices["window"] + 2 * choices["max_batched"]) // 4 + 3
    setup = configs.Setup(
        connector=target.name,
        connector_module=target.module,
        extra=target.extra(choices),
        num_blocks=least + choices["slack_blocks"],
        full=choices["window"] is None or not choices["only_windows"],
        tp=tp,
        replicas=replicas,
        nonce=f"{os.getpid()}-{next(_runs)}",
        **{one.name: choices[one.name] for one in fields(configs.Setup) if one.name in choices},
    )
    engine_faults = choices["kill_at"] is not None and target.kill is not None
    faults = Faults(**{name: choices[name] for name in ("hold", "fail_load", "fail_store", "fail_rank")}, budget=6)
    harness = Harness(
        setup,
        target.plug,
        chunk_blocks=choices["chunk_blocks"],
        faults=faults,
        seed=seed,
        late_workers=choices["late_workers"] and choices["async_scheduling"],
    )
    target.watch(harness)
    report = Report(seed, choices)
    try:
        _drive(harness, target, dice, choices, engine_faults)
        harness.check_idle(last=True)
        harness.check_outputs()
    except Raised:
        pass
    except Exception as error:
        harness.ledger.blame("died", told(error))
    finally:
        try:
            harness.shutdown()
        except Exception as error:
            harness.ledger.blame("raised", f"shutdown: {type(error).__name__}: {error}")
    report.violations = harness.ledger.violations
    if harness.excused:
        report.excused = True
        report.violations = [one for one in report.violations if one.rule not in ("P3", "P4")]
    report.counters = harness.ledger.counters
    report.counters["steps"] = harness.ledger.step
    report.slowest_ms = {name: 1000 * spent for name, spent in harness.calls.slowest.items()}
    report.log = harness.ledger.log
    report.seconds = time.perf_counter() - start
    return report


PLAIN: dict[str, Any] = {"theme": "plain", "aborts": 0.0, "resets": False, "fail_load": 0.0}
"""Overrides: no mishaps."""
LOADS_FAIL: dict[str, Any] = PLAIN | {"theme": "fail", "fail_load": 0.5, "failure_policy": "recompute"}
ONE_WINDOW_FAILS: dict[str, Any] = LOADS_FAIL | {
    "window": 9, "only_windows": True, "chunk_blocks": 1, "fail_rank": None, "hold": 0.7,
}  # fmt: skip
"""Loads fail, of a model whose only KV group is a window."""
ONE_RANK_FAILS: dict[str, Any] = LOADS_FAIL | {
    "window": None, "load": "sync", "fail_rank": 1, "parallel": (2, 1), "prefix_caching": False, "async_scheduling": False,
    "max_batched": 48, "policy": "fcfs", "hold": 0.0,
}  # fmt: skip
"""Synchronous loads fail, on one of two ranks."""


def passes(
    target: Callable[[], Target], seeds: range, overrides: Mapping[str, Any] | None = None, *, show: bool = False
) -> Counter[str]:
    """In no seed's scenario an obligation is broken; the counters of all of them. `show`: prints the step logs."""
    totals: Counter[str] = Counter()
    failed = []
    for seed in seeds:
        report = run_scenario(target(), seed, overrides)
        totals.update(report.counters)
        if show:
            print("\n".join(report.log))
        if report.violations:
            failed.append(report)
    print(f"{seeds}: {dict(totals)}")
    assert not failed, "\n\n".join(map(str, failed[:3])) + f"\n\nseeds {[one.seed for one in failed]}"
    return totals


def is_caught(target: Callable[[], Target], overrides: Mapping[str, Any], rules: set[str]) -> None:
    """In one of 40 seeds' scenarios these obligations are broken."""
    seen: set[str] = set()
    for seed in range(40):
        report = run_scenario(target(), seed, overrides)
        seen |= report.rules
        if rules <= report.rules:
            return
    raise AssertionError(f"not caught as {sorted(rules)} in 40 seeds, only as {sorted(seen)}")


def told(error: Exception) -> str:
    """An error, and where it came from, the innermost frame first."""
    frames = traceback.extract_tb(error.__traceback__)[::-1]
    where = " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in frames)
    return f"{type(error).__name__}: {error} ({where})"


def _drive(harness: Harness, target: Target, dice: random.Random, choices: Mapping[str, Any], engine_faults: bool) -> None:
    work = workload(dice, choices, "a")
    mishaps = {"down_until": 0}

    def pass_over(jobs: list[tuple[int, Wanted]], first: bool) -> None:
        waiting = list(jobs)
        begin = harness.ledger.step

        def arrive_and_mishap() -> None:
            step = harness.ledger.step - begin
            while waiting and waiting[0][0] <= step:
                harness.add(waiting.pop(0)[1])
            if not first:
                return
            if dice.random() < choices["aborts"] and harness.scheduler.requests:
                harness.abort(dice.choice(sorted(harness.scheduler.requests)))
            if choices["resets"] and dice.random() < 0.08:
                harness.reset(running=dice.random() < 0.6, connector=dice.random() < 0.5)
            if engine_faults and step == choices["kill_at"]:
                harness.ledger.note("engine killed")
                assert target.kill is not None
                target.kill()
                mishaps["down_until"] = step + choices["down_for"]
            if engine_faults and mishaps["down_until"] and step >= mishaps["down_until"]:
                mishaps["down_until"] = 0
                assert target.restart is not None
                harness.ledger.note("engine restarted")
                target.restart()

        for _ in range(60):
            if harness.stuck:
                return
            arrive_and_mishap()
            harness.run(choices["step_limit"], arrive_and_mishap, choices["patience"])
            if not waiting:
                break
            harness.ledger.step += 1

    pass_over(work, True)
    if not choices["second_pass"]:
        return
    if choices["theme"] != "plain":
        # Mishaps are rarer while nothing is cached: once more, now that there are hits.
        harness.check_idle(last=False)
        pass_over([(at, _again("m", one)) for at, one in work], True)
    harness.check_idle(last=False)
    harness.faults.fail_load = harness.faults.fail_store = 0.0
    if mishaps["down_until"] and target.restart is not None:
        target.restart()
    harness.reset(running=False, connector=False)
    before = harness.ledger.counters.get("hit_tokens", 0)
    pass_over([(0, _again("b", one)) for _, one in work], False)
    hit = harness.ledger.counters.get("hit_tokens", 0) - before
    harness.ledger.count("second_pass_hit_tokens", hit)


def _again(tag: str, wanted: Wanted) -> Wanted:
    """The same request under another name."""
    return replace(wanted, request_id=tag + wanted.request_id[1:], output=[], reason=None, aborted=False, load_failed=False)
