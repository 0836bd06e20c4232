"""The measurements: several vLLMs side by side take turns, so that a change of the machine hits all alike."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lookups as compared  # before anything that imports vLLM
from real.engine import Engine
from real.models import model
from real.prompts import prompt
from real.vllm import Connector, Vllm, Zygote

LENGTH = 4096
LLM: dict[str, Any] = {"max_num_batched_tokens": 8192, "num_gpu_blocks_override": 1024, "enable_prefix_caching": True}
"""As users run it: with vLLM's own prefix cache, which is reset where kvring's hits are wanted."""
OFFLOADING = "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector"

Found = dict[str, dict[str, list[float]]]


class Bench:
    """The engine, the vLLMs, and prompts that nobody has seen."""

    def __init__(self, scratch: Path) -> None:
        self.engine = Engine(scratch, arena="1GiB")
        # `offload` is imported in vLLM's processes.
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self.zygote = Zygote()
        self.fresh = itertools.count(1_000_000)
        self.vllms: list[Vllm] = []

    def __enter__(self) -> "Bench":
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end_all()
        self.zygote.close()
        self.engine.close()

    def plain(self, **llm: Any) -> Vllm:
        """A vLLM without a connector."""
        return self.keep(Vllm(self.zygote, model(), **LLM, **llm))

    def kvring(self, watched: bool = False, **options: Any) -> Vllm:
        """A vLLM with kvring: as users run it, or with its lookups `watched`."""
        extra = {"kvring.name": self.engine.name, **{f"kvring.{key}": value for key, value in options.items()}}
        only = ["get_num_new_matched_tokens"] if watched else ["update_state_after_alloc"]
        connector = Connector("KvringConnector", "kvring.vllm", extra, tap={"only": only, "plain_clock": True})
        return self.keep(Vllm(self.zygote, model(), connector, **LLM))

    def nothing(self) -> Vllm:
        """A vLLM with a connector that does nothing."""
        connector = Connector("Nothing", "real.nothing", {}, tap={"only": [], "plain_clock": True})
        return self.keep(Vllm(self.zygote, model(), connector, **LLM))

    def offloading(self) -> Vllm:
        """A vLLM with vLLM's own OffloadingConnector."""
        extra = {"spec_name": "MemcpySpec", "spec_module_path": "offload", "cpu_bytes_to_use": 1 << 30}
        tap = {"only": ["update_state_after_alloc"], "plain_clock": True}
        return self.keep(Vllm(self.zygote, model(), Connector("OffloadingConnector", OFFLOADING, extra, tap=tap), **LLM))

    def keep(self, vllm: Vllm) -> Vllm:
        self.vllms.append(vllm)
        return vllm

    def end_all(self) -> None:
        for vllm in self.vllms:
            vllm.close()
        self.vllms.clear()

    def new_prompt(self, length: int = LENGTH) -> list[int]:
        return prompt(next(self.fresh), length)

    def stored(self, vllm: Vllm) -> None:
        vllm.worker_idle()
        self.engine.settle()


def ask(vllm: Vllm, prompts: list[list[int]], output: int = 1, together: bool = False) -> list[dict[str, Any]]:
    return vllm.generate(prompts, max_tokens=output, logprobs=None, together=together)


def turns(count: int, variants: dict[str, Callable[[], Any]]) -> list[dict[str, Any]]:
    """Each variant once in each turn, in alternating order. The first turn warms up and does not count."""
    made = []
    for turn in range(count + 1):
        names = list(variants) if turn % 2 else list(reversed(variants))
        found = {name: variants[name]() for name in names}
        if turn:
            made.append(found)
    return made


def lookups(bench: Bench, count: int) -> Found:
    """Time of `get_num_new_matched_tokens`, Python included, for 128 chunks that are all there, while the engine is asleep,
    stopped or dead, and for as many that are all missing."""
    vllm = bench.kvring(watched=True)
    known = [bench.new_prompt() for _ in range(4)]
    ask(vllm, known)
    bench.stored(vllm)

    def asked(prompts: list[list[int]]) -> list[float]:
        vllm.calls(clear=True)
        answers = []
        for _ in range(10 * count):
            vllm.reset()
            answers += ask(vllm, prompts[:2])
            prompts.reverse()
        assert all(answer["cached"] >= LENGTH - 32 for answer in answers), "a lookup that should hit missed"
        return vllm.calls(clear=True)["lookup_ms"]

    times = {"asleep": asked(known)}
    bench.engine.pause()
    times["stopped"] = asked(known)
    bench.engine.resume()
    bench.engine.kill()
    times["dead"] = asked(known)
    bench.engine.start()
    ask(vllm, [bench.new_prompt() for _ in range(count)])
    times["miss"] = vllm.calls(clear=True)["lookup_ms"]
    bench.end_all()
    return {"lookup_us": {name: [ms * 1e3 for ms in values] for name, values in times.items()}}


def side_by_side(bench: Bench, count: int) -> Found:
    """Lookups of 4096 and of 131 072 tokens, in kvring, in vLLM's OffloadingConnector, and in a dict."""
    return compared.side_by_side(bench.engine, 5 * count)


def ttft(bench: Bench, count: int) -> Found:
    """Time to the first token of 4096: cold, from vLLM's own prefix cache, from kvring, from vLLM's OffloadingConnector."""
    none, own = bench.plain(), bench.plain()
    hits = {
        "async load": bench.kvring(),
        "sync load": bench.kvring(load="sync"),
        "offloading": bench.offloading(),
    }
    known = bench.new_prompt()
    ask(own, [known])
    for vllm in hits.values():
        ask(vllm, [known])
        bench.stored(vllm)

    def hitting(vllm: Vllm, own_cache: bool = False) -> Callable[[], Any]:
        def once() -> Any:
            if not own_cache:
                vllm.reset()
            answer = ask(vllm, [known])[0]
            loaded = LENGTH if own_cache else 0
            assert sum(answer["external"]) + loaded >= LENGTH - 32, f"no hit: {answer['external']}"
            assert answer["cached"] >= LENGTH - 32, f"a hit was expected: {answer['cached']} of {LENGTH} tokens"
            return answer

        return once

    variants: dict[str, Callable[[], Any]] = {
        "none cold": lambda: ask(none, [bench.new_prompt()])[0],
        "kvring cold": lambda: ask(hits["async load"], [bench.new_prompt()])[0],
        "prefix cache": hitting(own, own_cache=True),
        **{name: hitting(vllm) for name, vllm in hits.items()},
    }
    made = turns(count, variants)
    bench.end_all()
    return {
        "ttft_ms": {name: [turn[name]["ttft_ms"] for turn in made] for name in variants},
        "first_steps": {name: [turn[name]["first_steps"] for turn in made] for name in variants},
        "ttft_ratio": {name: [turn[name]["ttft_ms"] / turn["prefix cache"]["ttft_ms"] for turn in made] for name in variants},
    }


def decode(bench: Bench, count: int) -> Found:
    """Time of a step that decodes one request. Turns are of 32 steps, in each of which one block fills and is stored.

    The turns are short and many, because a few per cent of two milliseconds are less than the machine's own noise."""
    vllms = {"none": bench.plain(), "nothing": bench.nothing(), "kvring": bench.kvring()}
    steps, blocks = 32, 16
    made = []
    for _ in range(max(2, count // 4)):
        ask_for = bench.new_prompt(63)
        for vllm in vllms.values():
            vllm.add([ask_for], max_tokens=steps * (blocks + 1), logprobs=None)
            vllm.step(times=2)
        made += turns(blocks - 1, {name: (lambda vllm=vllm: vllm.timed_steps(times=steps)) for name, vllm in vllms.items()})
        for vllm in vllms.values():
            vllm.finish()
            vllm.take()
    bench.end_all()

    def ratios(of: str) -> dict[str, list[float]]:
        return {name: [turn[name][of] / turn["none"][of] for turn in made] for name in vllms}

    return {
        "decode_ms": {name: [turn[name]["clock"] / steps for turn in made] for name in vllms},
        "decode_ratio": ratios("clock"),
        "decode_cpu_ratio": ratios("cpu"),
    }


def throughput(bench: Bench, count: int) -> Found:
    """Sixteen requests at once that nobody has seen, 512 tokens and 32 more each: everything is stored, nothing is hit."""
    vllms = {"none": bench.plain(), "nothing": bench.nothing(), "kvring": bench.kvring()}
    requests, length, output = 16, 512, 32

    def tokens_per_s(vllm: Vllm) -> float:
        answers = ask(vllm, [bench.new_prompt(length) for _ in range(requests)], output=output, together=True)
        assert not any(answer["cached"] for answer in answers)
        return requests * (length + output) / max(answer["seconds"] for answer in answers)

    made = turns(count, {name: (lambda vllm=vllm: tokens_per_s(vllm)) for name, vllm in vllms.items()})
    bench.end_all()
    return {
        "tokens_per_s": {name: [turn[name] for turn in made] for name in vllms},
        "throughput_ratio": {name: [turn[name] / turn["none"] for turn in made] for name in ("nothing", "kvring")},
    }
