"""Starts an engine for vLLM: the first vLLM that finds none starts one, and that outlives the vLLM."""

from __future__ import annotations

import threading

from kvring import Engine, EngineError, engine_state
from kvring._logs import get_logger

logger = get_logger("vllm.kvring.autostart")

_LOOK_EVERY_S = 0.2
_PAUSE_MAX_S = 30.0


class Keeper:
    """Starts the engine where there is none when vLLM starts, and again whenever it has *died*. Several vLLMs may try at once:
    an engine holds a lock on its name, so one of them wins, and the others find its engine running.

    An engine that somebody has *stopped* is not started again before a vLLM starts anew. The segments tell the difference: a
    dead engine leaves them behind; one that was asked to stop leaves none, or notes the stop in them; and `kvring remove` takes
    them away. An engine that somebody starts by hand, of whatever size, is treated like our own: if it dies, its successor takes
    over its cache."""

    def __init__(self, name: str, arena: str):
        self._name = name
        self._arena = arena
        self._closed = threading.Event()
        self._engine: Engine | None = None
        self._thread: threading.Thread | None = None
        self._owed = False
        """A start of ours has failed and left no segments, not even those that it was to take over. Nobody has asked for that, so
        an absent engine is started again."""
        self._gone = 0
        """How many looks in a row have found it absent or stopped."""

    def ensure(self) -> None:
        """Starts an engine where none runs. Raises `EngineError` where that fails; its text says why, and what would help."""
        if engine_state(self._name) in ("absent", "dead", "stopped"):
            # With the size that vLLM's configuration asks for, also where a dead engine had another one.
            self._start()

    def _start(self, *arguments: str) -> None:
        engine = Engine(self._name, self._arena, extra_args=arguments, detach=True)
        try:
            engine.start()
        except EngineError:
            state = engine_state(self._name)
            self._owed = state == "absent"
            if state in ("absent", "dead", "stopped"):
                raise
            # Another vLLM was faster: its engine runs.
        else:
            # Kept in order to notice when the engine ends.
            self._engine = engine
            self._owed = False
            logger.info("started the kvring engine %s (pid %s); its log is %s", self._name, engine.pid, engine.log_path)

    def watch(self) -> None:
        """Starts a thread that starts the engine again whenever it has died."""
        self._thread = threading.Thread(target=self._watch, name="kvring-autostart", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        pause = _LOOK_EVERY_S
        while not self._closed.wait(pause):
            try:
                self._look()
                pause = _LOOK_EVERY_S
            except Exception as error:
                if pause == _LOOK_EVERY_S:
                    logger.warning("the kvring engine %s is gone and cannot be started: %s; trying again", self._name, error)
                pause = min(pause * 2, _PAUSE_MAX_S)

    def _look(self) -> None:
        if self._engine is not None and not self._engine.is_running:
            self._engine.stop()
            self._engine = None
        state = engine_state(self._name)
        if state == "dead" or (state == "absent" and self._owed):
            # With the size that the dead engine had: somebody may have started it by hand with another one than ours.
            self._start("--any-arena")
        elif state in ("absent", "stopped"):
            self._gone += 1
            # The first such look may fall between the two engines of a cold start.
            if self._gone == 2:
                logger.warning(
                    "the kvring engine %s was stopped or removed by somebody; vLLM goes on without it until a vLLM is started"
                    " anew, or somebody starts one: kvring serve --name %s --arena %s",
                    self._name,
                    self._name,
                    self._arena,
                )
            return
        self._gone = 0

    def close(self) -> None:
        """Ends the thread. The engine lives on. A start that is under way is not waited for."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(0.1)
