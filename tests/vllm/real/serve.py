"""The program of a zygote's child: it makes one `LLM` and does steps with it until it is told to end.

The first line it reads says how to make it (`vllm.Vllm` writes it); every further line is a step: `{"do": NAME, …}`. Each is
answered by a line `{"ok": …}` or `{"error": …}`. The `LLM` is driven by `add_request` and `step`, not by `generate`: so a
test can count engine steps, abort in the middle, and see what the scheduler sees.
"""

import json
import sys
import time
import traceback
from copy import copy
from dataclasses import dataclass, field
from typing import Any, TextIO

from waiting import wait_for

from real import actions, tap


@dataclass
class Running:
    """A request between its start and its end."""

    name: str
    internal: str
    started: float
    steps_before: int
    request: Any = None
    answer: dict[str, Any] = field(default_factory=dict)


def fork_workers() -> None:
    """Has vLLM fork its own processes as well: on CPU it spawns them, and each would import for ten seconds.

    There is nothing yet that a fork could break: no thread, no compute, no connector."""
    import os

    from vllm.platforms.cpu import CpuPlatform

    configure = CpuPlatform.check_and_update_config.__func__

    def and_fork(cls, config):
        configure(cls, config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(and_fork)


class Driver:
    """One `LLM`, and the steps."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from vllm import LLM

        fork_workers()
        if spec["llm"].get("runner") == "pooling":
            # An `LLM` wants a tokenizer then, for the scores that it offers as well.
            from vllm.engine.arg_utils import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            self.engine = LLMEngine.from_engine_args(EngineArgs(**spec["llm"], disable_log_stats=True))
        else:
            self.engine = LLM(**spec["llm"]).llm_engine
        core = getattr(self.engine.engine_core, "engine_core", None)
        # An engine core in a process of its own is out of reach: tests see its tokens only.
        self.scheduler = core.scheduler if core is not None else None
        self.running: dict[str, Running] = {}
        self.finished: dict[str, dict[str, Any]] = {}
        self.steps = 0
        self.outputs = 0
        self.count = 0

    def generate(self, prompts: list[list[int]], together: bool = False, **params) -> list[dict[str, Any]]:
        """Answers to prompts, one after the other or all at once."""
        names = []
        for prompt in prompts:
            names += self.add([prompt], **params)
            if not together:
                self.finish()
        self.finish()
        return [self.finished.pop(name) for name in names]

    def settings(self, regex: str | None = None, **params) -> Any:
        """Sampling parameters; `regex`: the answer must match it."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        if params.get("n", 1) > 1:  # or each of them would end the answer
            params["output_kind"] = RequestOutputKind.FINAL_ONLY
        if regex is not None:
            params["structured_outputs"] = StructuredOutputsParams(regex=regex)
        return SamplingParams(**{"temperature": 0, "ignore_eos": True, "detokenize": False, "logprobs": 5, **params})

    def add(self, prompts: list[list[int]], salt: str | None = None, lora: list[Any] | None = None, **params) -> list[str]:
        """Starts requests; the names that the other steps know them by. `lora`: an adapter's name, number and folder."""
        from vllm.lora.request import LoRARequest

        adapter = LoRARequest(*lora) if lora else None
        names = []
        for prompt in prompts:
            self.count += 1
            name = f"r{self.count}"
            told = {"prompt_token_ids": prompt, **({"cache_salt": salt} if salt else {})}
            settings = self.settings(**params)
            internal = self.engine.add_request(name, told, settings, lora_request=adapter)
            started = Running(name, internal, time.perf_counter(), self.steps)
            if self.scheduler is not None:
                # With `n` > 1 each answer is a request of its own, under another name.
                started.request = self.scheduler.requests.get(internal)
            self.running[name] = started
            names.append(name)
        return names

    def session(self, pieces: list[list[int]], **params) -> dict[str, Any]:
        """A streaming session: each piece of input continues the conversation so far. vLLM discards the last token of an answer
        when the next piece comes. Only `AsyncLLM` has this for its users; here it is done as it does it.

        The tokens of each answer, and what vLLM held in the end that was not discarded."""
        from vllm.sampling_params import RequestOutputKind

        self.count += 1
        name, answers, tokens = f"s{self.count}", [], []
        for last, piece in [*((False, piece) for piece in pieces), (True, [0])]:
            request = self.engine.input_processor.process_inputs(
                name,
                {"prompt_token_ids": piece},
                self.settings(output_kind=RequestOutputKind.DELTA, **params),
                supported_tasks=self.engine.get_supported_tasks(),
                resumable=not last,
            )
            request.external_req_id = name
            self.engine.output_processor.add_request(request, None, None, 0)
            # `AsyncLLM` has its engine core in another process: here the two would append to one list.
            theirs = copy(request)
            theirs.prompt_token_ids = list(piece)
            self.engine.engine_core.add_request(theirs)
            answer: list[int] = []
            while not last and len(answer) < params["max_tokens"]:
                for output in self.engine.step():
                    answer += output.outputs[0].token_ids
            answers.append(answer)
            tokens += [*piece, *answer[:-1]]
        self.drain()
        return {"answers": answers[:-1], "tokens": tokens[:-1]}

    def embed(self, prompts: list[list[int]]) -> list[dict[str, Any]]:
        """The embeddings of prompts, one after the other, and how many tokens of each came from a cache."""
        from vllm import PoolingParams

        answers = []
        for prompt in prompts:
            self.count += 1
            self.engine.add_request(f"r{self.count}", {"prompt_token_ids": prompt}, PoolingParams(task="embed"))
            while self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    answers.append({"embedding": output.outputs.data.tolist(), "cached": output.num_cached_tokens})
        return answers

    def step(self, times: int = 1) -> int:
        """Engine steps; the number of requests that are still running."""
        for _ in range(times):
            if not self.engine.has_unfinished_requests():
                break
            self.steps += 1
            for output in self.engine.step():
                self.outputs += 1
                self.note(output)
        return len(self.running)

    def counted_steps(self) -> int:
        """So many there were."""
        return self.steps

    def timed_steps(self, times: int) -> dict[str, float]:
        """Engine steps, and their time all together, in milliseconds: by the clock, and of this thread on a core."""
        clock, cpu = time.perf_counter(), time.thread_time()
        self.step(times)
        return {"clock": (time.perf_counter() - clock) * 1e3, "cpu": (time.thread_time() - cpu) * 1e3}

    def note(self, output: Any) -> None:
        running = self.running[output.request_id]
        running.answer.setdefault("ttft_ms", (time.perf_counter() - running.started) * 1e3)
        running.answer.setdefault("first_steps", self.steps - running.steps_before)
        if output.finished:
            self.end(running, output)

    def end(self, running: Running, output: Any) -> None:
        completion = output.outputs[0]
        answer = running.answer
        answer["tokens"] = list(completion.token_ids)
        answer["logprobs"] = [
            [choice[token].logprob, *sorted((other.logprob for other in choice.values()), reverse=True)[:5]]
            for token, choice in zip(completion.token_ids, completion.logprobs or [], strict=False)
        ]
        answer["finish_reason"] = completion.finish_reason
        answer["choices"] = [list(choice.token_ids) for choice in output.outputs]
        answer["prompt_logprobs"] = [
            sorted((choice.logprob for choice in position.values()), reverse=True) if position else []
            for position in output.prompt_logprobs or []
        ]
        answer["cached"] = output.num_cached_tokens
        answer["seconds"] = time.perf_counter() - running.started
        answer["external"] = tap.record.admissions.get(running.internal, [])
        answer["lookups"] = [lookup._asdict() for lookup in tap.record.lookups if lookup.request == running.internal]
        answer["preemptions"] = running.request.num_preemptions if running.request is not None else None
        self.finished[running.name] = answer
        del self.running[running.name]

    def finish(self, patience: int = 100_000) -> dict[str, dict[str, Any]]:
        """Steps until nothing is running. A request that hangs is an error, with their states in the scheduler: so many
        steps in a row without a token take many seconds, and longer where the machine is slow."""
        empty = 0
        while self.running:
            before = self.outputs
            self.step()
            empty = empty + 1 if self.outputs == before else 0
            if empty > patience:
                state = {name: str(r.request.status if r.request else "?") for name, r in self.running.items()}
                raise TimeoutError(f"requests do not end: {empty} steps without a token, {state}")
        return {}

    def take(self) -> dict[str, dict[str, Any]]:
        """The answers of requests that were started by `add` and have ended, by name."""
        finished, self.finished = self.finished, {}
        return finished

    def abort(self, names: list[str]) -> int:
        """Aborts requests; the number still running."""
        for name in names:
            self.engine.abort_request([name])
            self.running.pop(name, None)
        return len(self.running)

    def reset(self, connector: bool = False, running: bool = False, at_once: bool = False) -> bool:
        """Resets vLLM's own prefix cache, and on demand the connector; `at_once`: without a step more."""
        if not at_once:
            self.drain()
        done = self.engine.reset_prefix_cache(reset_running_requests=running, reset_connector=connector)
        if not done and not connector and not at_once:
            raise RuntimeError("vLLM did not reset its prefix cache: somebody holds blocks")
        return done

    def sleep(self, level: int) -> None:
        """As `LLM.sleep`."""
        self.engine.sleep(level)

    def wake_up(self) -> None:
        """As `LLM.wake_up`."""
        self.engine.wake_up()

    def drain(self) -> None:
        """Empty steps while something is left to do for requests that have ended, as vLLM's own loop does them."""

        def is_done() -> bool:
            if self.scheduler is None or self.running or not self.scheduler.has_requests():
                return True
            self.engine.step()
            return False

        wait_for(is_done, "vLLM has nothing left to do")

    def calls(self, clear: bool = False) -> dict[str, Any]:
        """The tap's record of this process."""
        seen = {
            "calls": dict(tap.record.calls),
            "lookup_ms": [lookup.seconds * 1e3 for lookup in tap.record.lookups],
            "failed_blocks": tap.record.failed_blocks,
            "failed_requests": tap.record.failed_requests,
            "hooks_left": sum(not hook.done for hook in tap.record.hooks),
        }
        if clear:
            tap.record.clear()
        return seen

    def hook(self, method: str, action: str, nth: int = 1, when: str = "before", **arguments) -> None:
        """Has `actions.ACTION(**arguments)` run at a call of the connector."""
        chosen = getattr(actions, action)
        tap.record.hooks.append(tap.Hook(method, lambda: chosen(**arguments), nth, when))

    def act(self, action: str, **arguments) -> Any:
        """Runs an action now."""
        return getattr(actions, action)(**arguments)

    def worker_idle(self) -> None:
        """Waits until kvring's workers have no open job, in whichever processes they are."""
        self.engine.collective_rpc(actions.worker_idle)

    def scheduler_state(self) -> dict[str, int] | None:
        """Counts of the scheduler, all 0 after every request has ended (obligation P0). `None`: out of reach."""
        if self.scheduler is None:
            return None
        self.drain()
        pool = self.scheduler.kv_cache_manager.block_pool
        return {
            "requests": len(self.scheduler.requests),
            "waiting": len(self.scheduler.waiting),
            "running": len(self.scheduler.running),
            "blocks_used": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        }


def serve(steps: TextIO, answers: TextIO) -> int:
    """Answers steps until end of input."""

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    driver = None
    for line in steps:
        asked = json.loads(line)
        try:
            if driver is None:
                driver = Driver(asked)
                say({"ok": None})
            else:
                say({"ok": getattr(driver, asked.pop("do"))(**asked)})
        except BaseException:
            # Not into the log: tests look for tracebacks there.
            say({"error": traceback.format_exc()})
            if driver is None:
                return 1
    # vLLM ends its own worker processes and calls the connector's `shutdown`.
    if driver is not None:
        driver.engine.engine_core.shutdown()
    sys.stderr.flush()
    return 0
